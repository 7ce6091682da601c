"""Float8 copies of weights, all of them in one launch: what `float8.Float8Rows.of` computes.

A program owns one row: its maximum, its scale, its values. Bytes an element, of bfloat16 weights:
2 read and 1 written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from masked_vit_kernels.float8 import FLOAT8, LARGEST, SMALLEST_MAXIMUM, Float8Rows
from masked_vit_kernels.kernel_language import tl, triton
from masked_vit_kernels.launch import KernelLaunch, round_up_to_power_of_two, runs_kernels
from masked_vit_kernels.optimizer.multi_tensor import TRITON_TYPES, addresses, local

TABLE_COLUMNS = tl.constexpr(6)  # source, values, scale, rows before, columns, unused
_LARGEST = tl.constexpr(LARGEST)
_SMALLEST_MAXIMUM = tl.constexpr(SMALLEST_MAXIMUM)


@triton.jit
def _quantize_kernel(
    owner_ptr,  # (rows,) int32: the weight of every row
    table_ptr,  # (number of weights, TABLE_COLUMNS) int64
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    entry_ptr = table_ptr + tl.load(owner_ptr + program).to(tl.int64) * TABLE_COLUMNS
    source = tl.load(entry_ptr)
    values = tl.load(entry_ptr + 1)
    scale_ptr = tl.load(entry_ptr + 2).to(tl.pointer_type(tl.float32))
    row = program - tl.load(entry_ptr + 3)
    columns_by_16 = tl.load(entry_ptr + 4)
    start = row * columns_by_16 * 16
    source_ptr = tl.multiple_of(source.to(tl.pointer_type(DTYPE)), 16)
    values_ptr = tl.multiple_of(values.to(tl.pointer_type(tl.float8e4nv)), 16)
    lanes = tl.arange(0, BLOCK)  # [BLOCK]
    inside = lanes < columns_by_16 * 16
    x = tl.load(source_ptr + start + lanes, mask=inside, other=0.0).to(tl.float32)
    maximum = tl.maximum(tl.max(tl.abs(x), 0), _SMALLEST_MAXIMUM)
    x = x * tl.div_rn(_LARGEST, maximum)
    x = tl.minimum(tl.maximum(x, -_LARGEST), _LARGEST)
    tl.store(values_ptr + start + lanes, x.to(tl.float8e4nv), mask=inside)
    tl.store(scale_ptr + row, tl.div_rn(maximum, _LARGEST))


def quantize_launch(owner: Tensor, table: Tensor, dtype: torch.dtype, columns: int) -> KernelLaunch:
    """owner (rows,) int32, table (weights, TABLE_COLUMNS) int64; `columns` the most of a weight."""
    return KernelLaunch(
        kernel=_quantize_kernel,
        grid=(owner.shape[0],),
        arguments={
            "owner_ptr": owner,
            "table_ptr": table,
            "DTYPE": TRITON_TYPES[dtype],
            "BLOCK": round_up_to_power_of_two(columns),
        },
        num_warps=8 if columns > 2048 else 4,
    )


class Float8Copies:
    """(weight, copy) pairs that `refresh` makes equal again."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Float8Rows]] = []
        self._launches: list[KernelLaunch] = []
        self._built: list[list[KernelLaunch]] = []  # a captured graph reads its tables for good
        self._placement: list[int] = []

    def add(self, weight: Tensor, copy: Float8Rows) -> None:
        """Keep `copy` equal to `weight`.

        Raises:
            ValueError: shapes or devices differ, or the weight is not contiguous or sharded.
        """
        if hasattr(weight, "to_local"):
            raise ValueError("float8 copies of sharded weights are not kept: a scale needs its row")
        if weight.shape != copy.values.shape or weight.device != copy.values.device:
            raise ValueError(
                f"a weight of shape {tuple(weight.shape)} on {weight.device} has no copy of shape "
                f"{tuple(copy.values.shape)} on {copy.values.device}"
            )
        if not weight.is_contiguous():
            raise ValueError(f"weights must be contiguous, got strides {weight.stride()}")
        if copy.values.dtype != FLOAT8:
            raise ValueError(f"copies must be {FLOAT8}, got {copy.values.dtype}")
        self.pairs.append((weight, copy))
        self._placement = []

    @torch.no_grad()
    def refresh(self) -> None:
        """Round every weight anew; a weight that has not changed keeps its copy's bits."""
        if not self.pairs:
            return
        if not runs_kernels(self.pairs[0][0].device):
            for weight, copy in self.pairs:
                copy.copy_(weight)
            return
        placement = [weight.data_ptr() for weight, _ in self.pairs]
        if placement != self._placement:
            self._launches, self._placement = self._build(), placement
            self._built.append(self._launches)
        for launch in self._launches:
            launch.run()

    def _build(self) -> list[KernelLaunch]:
        """A launch for each dtype and width of rows, so that no program idles over short ones."""
        kinds: dict[tuple[torch.dtype, int], list[tuple[Tensor, Float8Rows]]] = {}
        for weight, copy in self.pairs:
            width = round_up_to_power_of_two(weight.shape[1])
            kinds.setdefault((weight.dtype, width), []).append((weight, copy))
        return [
            quantize_launch(*_tables(members), dtype, width)
            for (dtype, width), members in kinds.items()
        ]


def _tables(members: Sequence[tuple[Tensor, Float8Rows]]) -> tuple[Tensor, Tensor]:
    """Owner of every row, and the table of addresses."""
    device = members[0][0].device
    rows = torch.tensor([weight.shape[0] for weight, _ in members])
    columns = [
        addresses(local(weight) for weight, _ in members),
        addresses(copy.values for _, copy in members),
        addresses(copy.scale for _, copy in members),
        (rows.cumsum(0) - rows).tolist(),
        [weight.shape[1] // 16 for weight, _ in members],
        [0] * len(members),
    ]
    owner = torch.repeat_interleave(torch.arange(len(members)), rows).to(torch.int32)
    table = torch.tensor(columns, dtype=torch.int64).T.contiguous()
    return owner.to(device), table.to(device)
