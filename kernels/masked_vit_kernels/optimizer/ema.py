"""Exponential moving average of one list of tensors by another, for any teacher-student method.

    target <- momentum * target + (1 - momentum) * source

in one launch a combination of dtypes, however many tensors there are. Bytes an element: 12 in
float32 (two reads, one write), 10 where the source is bfloat16.

`AdamWEMA` does the same within its optimiser pass. A target in half precision is refused here: at
momentum .996 a bfloat16 weight would never move, because the change rounds away.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from masked_vit_kernels.kernel_language import tl, triton
from masked_vit_kernels.launch import KernelLaunch, runs_kernels
from masked_vit_kernels.optimizer.ema_arguments import (
    check_momentum,
    match_by_name,
    tensor_list,
)
from masked_vit_kernels.optimizer.multi_tensor import (
    TILE,
    TRITON_TYPES,
    UPDATE_BLOCK,
    FlatView,
    addresses,
    is_dense,
    lerp,
    local,
    tile_map,
)


@triton.jit
def _ema_kernel(
    tiles_ptr,  # (number of tiles, 2) int32: tensor, tile within it
    table_ptr,  # (number of tensors, 4) int64: target, source, numel
    momentum_ptr,  # 0-d float32 or float64, read where MOMENTUM_ON_DEVICE
    keep,  # momentum
    rate,  # 1 - momentum, taken in float64 by the host
    SOURCE_DTYPE: tl.constexpr,
    MOMENTUM_ON_DEVICE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + tl.load(tiles_ptr + 2 * program).to(tl.int64) * 4
    first = tl.load(tiles_ptr + 2 * program + 1).to(tl.int64) * TILE
    target = tl.load(row_ptr)
    source = tl.load(row_ptr + 1)
    numel = tl.load(row_ptr + 2)
    if MOMENTUM_ON_DEVICE:
        momentum = tl.load(momentum_ptr).to(tl.float64)
        keep = momentum.to(tl.float32)
        rate = (1.0 - momentum).to(tl.float32)
    if (first + TILE <= numel) & ((target | source) % 16 == 0):
        target_ptr = tl.multiple_of(target.to(tl.pointer_type(tl.float32)), 16)
        source_ptr = tl.multiple_of(source.to(tl.pointer_type(SOURCE_DTYPE)), 16)
        for offset in range(0, TILE, BLOCK):
            lanes = first + offset + tl.arange(0, BLOCK)  # [BLOCK]
            old = tl.load(target_ptr + lanes)
            new = tl.load(source_ptr + lanes).to(tl.float32)
            tl.store(target_ptr + lanes, lerp(old, new, keep, rate))
    else:
        target_ptr = target.to(tl.pointer_type(tl.float32))
        source_ptr = source.to(tl.pointer_type(SOURCE_DTYPE))
        for offset in range(0, tl.minimum(numel - first, TILE).to(tl.int32), BLOCK):
            lanes = first + offset + tl.arange(0, BLOCK)  # [BLOCK]
            inside = lanes < numel
            old = tl.load(target_ptr + lanes, mask=inside, other=0.0)
            new = tl.load(source_ptr + lanes, mask=inside, other=0.0).to(tl.float32)
            tl.store(target_ptr + lanes, lerp(old, new, keep, rate), mask=inside)


def ema_launch(
    tiles: Tensor, table: Tensor, momentum: float | Tensor, source_dtype: torch.dtype
) -> KernelLaunch:
    """tiles (number of tiles, 2) int32, table (number of tensors, 4) int64, on the device."""
    on_device = isinstance(momentum, Tensor)
    return KernelLaunch(
        kernel=_ema_kernel,
        grid=(tiles.shape[0],),
        arguments={
            "tiles_ptr": tiles,
            "table_ptr": table,
            "momentum_ptr": momentum if on_device else table,
            "keep": 0.0 if on_device else float(momentum),
            "rate": 0.0 if on_device else 1.0 - momentum,
            "SOURCE_DTYPE": TRITON_TYPES[source_dtype],
            "MOMENTUM_ON_DEVICE": on_device,
            "TILE": TILE,
            "BLOCK": UPDATE_BLOCK,
        },
    )


class _Tables:
    """Tile map and pointer table of one list of pairs with one source dtype."""

    def __init__(self, targets: Sequence[Tensor], sources: Sequence[Tensor]):
        device = targets[0].device
        sizes = [target.numel() for target in targets]
        table = torch.zeros(len(sizes), 4, dtype=torch.int64)
        columns = [addresses(targets), addresses(sources), sizes]
        table[:, :3] = torch.tensor(columns, dtype=torch.int64).T
        self.tiles, self.table = (_to_device(t, device) for t in (tile_map(sizes), table))


_tables: dict[tuple, _Tables] = {}
_MAX_TABLES = 16
_read_by_graphs: list[_Tables] = []  # a captured launch reads its tables at every replay


def _cached_tables(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> _Tables:
    """The tables of these very addresses and sizes; weights rarely move between steps."""
    key = (targets[0].device, *addresses(targets), *addresses(sources), *map(len, targets))
    if key not in _tables:
        if len(_tables) == _MAX_TABLES:
            _tables.pop(next(iter(_tables)))
        _tables[key] = _Tables(targets, sources)
    tables = _tables[key]
    captures = targets[0].is_cuda and torch.cuda.is_current_stream_capturing()
    if captures and tables not in _read_by_graphs:
        _read_by_graphs.append(tables)
    return tables


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@torch.no_grad()
def ema_update_(
    targets: Sequence[Tensor] | nn.Module,
    sources: Sequence[Tensor] | nn.Module,
    momentum: float | Tensor,
) -> None:
    """target <- momentum * target + (1 - momentum) * source, in place, for every pair.

    Args:
        targets: float32 (on the CPU also float64) tensors of any shape; integer and bool buffers
            are copied from their source.
        sources: as many tensors of the same shapes and device; float32, bfloat16 or float16. Two
            modules in the place of the two lists are matched by the names of their parameters and
            buffers.
        momentum: float or 0-d tensor on the targets' device; no host sync on a GPU.

    Raises:
        TypeError: neither lists of tensors nor two modules; a momentum that is no number.
        ValueError: numbers of tensors, names, shapes or devices differ; a half-precision target;
            tensors on the meta device; a momentum outside [0, 1], unless on a GPU. Nothing is
            changed then.
    """
    if isinstance(targets, nn.Module) and isinstance(sources, nn.Module):
        targets, sources = zip(*match_by_name(targets, sources), strict=True)
    targets, sources = tensor_list("targets", targets), tensor_list("sources", sources)
    if len(targets) != len(sources):
        raise ValueError(f"{len(targets)} targets cannot be averaged with {len(sources)} sources")
    check_momentum(momentum)
    for position, (target, source) in enumerate(zip(targets, sources, strict=True)):
        _check_pair(target, source, position)
    pairs = []
    for target, source in zip(targets, sources, strict=True):
        if target.is_floating_point():
            pairs.append((local(target), local(source)))
        else:
            target.copy_(source)
    on_gpu = [pair for pair in pairs if runs_kernels(pair[0].device)]
    if on_gpu:
        _update_on_device(on_gpu, momentum)
    on_cpu = [pair for pair in pairs if not runs_kernels(pair[0].device)]
    if on_cpu:
        converted = [source.to(target.dtype) for target, source in on_cpu]
        torch._foreach_lerp_([target for target, _ in on_cpu], converted, 1.0 - float(momentum))


def _check_pair(target: Tensor, source: Tensor, position: int) -> None:
    if target.shape != source.shape:
        raise ValueError(
            f"pair {position}: target {tuple(target.shape)} and source {tuple(source.shape)} must "
            "have one shape"
        )
    if target.device != source.device:
        raise ValueError(f"pair {position}: target on {target.device}, source on {source.device}")
    if target.is_meta:
        raise ValueError(f"pair {position}: tensors on the meta device hold no values to average")
    if target.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"pair {position}: a {target.dtype} target would not move at a momentum near 1: "
            "average in float32 and round a copy"
        )


def _update_on_device(pairs: list[tuple[Tensor, Tensor]], momentum: float | Tensor) -> None:
    by_dtype: dict[torch.dtype, list[tuple[FlatView, FlatView]]] = {}
    for target, source in pairs:
        if target.dtype != torch.float32 or source.dtype not in TRITON_TYPES:
            raise ValueError(f"no kernel averages {source.dtype} into {target.dtype}")
        like = target if is_dense(target) else torch.empty_like(target)
        views = FlatView(target, like), FlatView(source, like)
        by_dtype.setdefault(source.dtype, []).append(views)
    for source_dtype, members in by_dtype.items():
        for views in members:
            for view in views:
                view.load()
        tables = _cached_tables([t.flat for t, _ in members], [s.flat for _, s in members])
        ema_launch(tables.tiles, tables.table, momentum, source_dtype).run()
        for target_view, _ in members:
            target_view.store()
    increment_version([target for target, _ in pairs])
