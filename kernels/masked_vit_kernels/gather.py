"""Take rows of token tensors by index, and put them back.

    gather:   out[r] = x[image(r), indices[r]]                 zero where indices[r] = -1
    scatter:  out[b, n] = x[r] where (b, n) = (image(r), indices[r]), else fill[b, n]

Dense, packed and flat layouts differ only in image(r) (`rows.py`); one kernel serves all three.

The gradient of a gather is a scatter with fill zero when no row is taken twice, and a sum over
equal places otherwise (`rows.py`). The scatter inverts the index first: `place_to_row[place] =
r` is written for the places that are taken and *nowhere else*. A reader trusts an entry only if
its row leads back to the place (the sparse set of Briggs and Torczon), so the map is never cleared
and every row of the result, zeros included, is written once in one launch.

Bytes moved a row of D elements: read and write once each, 2 * D * element size, plus the index
(and 12 bytes of map a place in the backward).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from masked_vit_kernels import cpu
from masked_vit_kernels.launch import KernelLaunch, check_same_device, check_shape
from masked_vit_kernels.packing import Packing
from masked_vit_kernels.rows import (
    RowIndex,
    column_block,
    locate_rows,
    row_index,
    sum_dtype,
    sum_rows_by_place,
    takes_triton,
    tile_rows,
    with_unit_columns,
)

if TYPE_CHECKING:
    from masked_vit_kernels.audit import AuditCase

# ----------------------------------------------------------------------------- kernels


@triton.jit
def _gather_rows_kernel(
    x_ptr,  # (B, N, D)
    indices_ptr,  # (R,)
    sequence_ids_ptr,  # (R,) or None
    out_ptr,  # (R, D)
    num_rows,
    num_tokens,
    rows_per_image,
    stride_xb,
    stride_xn,
    SEQUENCES_PER_IMAGE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_range = rows < num_rows
    in_width = columns < D
    images, tokens, taken = locate_rows(
        rows, in_range, indices_ptr, sequence_ids_ptr,
        num_tokens, rows_per_image, SEQUENCES_PER_IMAGE,
    )  # fmt: skip
    source = images * stride_xb + tokens * stride_xn
    values = tl.load(  # [BLOCK_ROWS, BLOCK_D]
        x_ptr + source[:, None] + columns[None, :],
        mask=taken[:, None] & in_width[None, :],
        other=0,
    )
    tl.store(
        out_ptr + rows[:, None] * D + columns[None, :],
        values,
        mask=in_range[:, None] & in_width[None, :],
    )


@triton.jit
def _invert_rows_kernel(
    indices_ptr,  # (R,)
    sequence_ids_ptr,  # (R,) or None
    place_to_row_ptr,  # (B * N,) int32
    num_rows,
    num_tokens,
    rows_per_image,
    SEQUENCES_PER_IMAGE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    images, tokens, taken = locate_rows(
        rows, rows < num_rows, indices_ptr, sequence_ids_ptr,
        num_tokens, rows_per_image, SEQUENCES_PER_IMAGE,
    )  # fmt: skip
    tl.store(place_to_row_ptr + images * num_tokens + tokens, rows.to(tl.int32), mask=taken)


@triton.jit
def _row_at_place(
    places,  # int64, b * N + n
    in_range,
    place_to_row_ptr,
    indices_ptr,
    sequence_ids_ptr,
    num_rows,
    num_tokens,
    rows_per_image,
    SEQUENCES_PER_IMAGE: tl.constexpr,
):
    """The row that lies at each place (int64), and whether one does.

    The map holds anything where nothing was written: an entry counts if its row leads back here.
    """
    rows = tl.load(place_to_row_ptr + places, mask=in_range, other=-1).to(tl.int64)
    possible = in_range & (rows >= 0) & (rows < num_rows)
    images, tokens, taken = locate_rows(
        rows, possible, indices_ptr, sequence_ids_ptr,
        num_tokens, rows_per_image, SEQUENCES_PER_IMAGE,
    )  # fmt: skip
    return rows, taken & (images * num_tokens + tokens == places)


@triton.jit
def _scatter_rows_kernel(
    x_ptr,  # (R, D)
    fill_ptr,  # (B, N, D), strides 0 where it is broadcast, or None for zeros
    indices_ptr,  # (R,)
    sequence_ids_ptr,  # (R,) or None
    place_to_row_ptr,  # (B * N,) int32
    out_ptr,  # (B, N, D)
    num_rows,
    num_tokens,
    num_places,
    rows_per_image,
    stride_xr,
    stride_fb,
    stride_fn,
    SEQUENCES_PER_IMAGE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * BLOCK_PLACES + tl.arange(0, BLOCK_PLACES)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_range = places < num_places
    in_width = columns < D
    rows, found = _row_at_place(
        places, in_range, place_to_row_ptr, indices_ptr, sequence_ids_ptr,
        num_rows, num_tokens, rows_per_image, SEQUENCES_PER_IMAGE,
    )  # fmt: skip
    values = tl.load(  # [BLOCK_PLACES, BLOCK_D]
        x_ptr + rows[:, None] * stride_xr + columns[None, :],
        mask=found[:, None] & in_width[None, :],
        other=0,
    )
    if fill_ptr is not None:
        source = (places // num_tokens) * stride_fb + (places % num_tokens) * stride_fn
        filling = tl.load(  # [BLOCK_PLACES, BLOCK_D]
            fill_ptr + source[:, None] + columns[None, :],
            mask=(in_range & ~found)[:, None] & in_width[None, :],
            other=0,
        )
        values = tl.where(found[:, None], values, filling)
    tl.store(
        out_ptr + places[:, None] * D + columns[None, :],
        values,
        mask=in_range[:, None] & in_width[None, :],
    )


@triton.jit
def _fill_gradient_kernel(
    grad_ptr,  # (B, N, D) gradient of the scatter's output, read as (outer, inner, D)
    indices_ptr,  # (R,)
    sequence_ids_ptr,  # (R,) or None
    place_to_row_ptr,  # (B * N,) int32
    partial_ptr,  # (chunks, inner, D): sums over each chunk's outer positions
    num_rows,
    num_tokens,
    num_places,
    num_inner,
    outer_per_chunk,
    rows_per_image,
    SEQUENCES_PER_IMAGE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
):
    inner = tl.program_id(0).to(tl.int64) * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    chunk = tl.program_id(2).to(tl.int64)
    in_width = columns < D
    total = tl.zeros((BLOCK_INNER, BLOCK_D), dtype=SUM_DTYPE)  # [BLOCK_INNER, BLOCK_D]
    first = chunk * outer_per_chunk
    for outer in range(first, first + outer_per_chunk):
        places = outer * num_inner + inner
        in_range = (inner < num_inner) & (places < num_places)
        _, found = _row_at_place(
            places, in_range, place_to_row_ptr, indices_ptr, sequence_ids_ptr,
            num_rows, num_tokens, rows_per_image, SEQUENCES_PER_IMAGE,
        )  # fmt: skip
        total += tl.load(
            grad_ptr + places[:, None] * D + columns[None, :],
            mask=(in_range & ~found)[:, None] & in_width[None, :],
            other=0,
        ).to(SUM_DTYPE)
    tl.store(
        partial_ptr + (chunk * num_inner + inner)[:, None] * D + columns[None, :],
        total,
        mask=(inner < num_inner)[:, None] & in_width[None, :],
    )


# ----------------------------------------------------------------------------- launches


def gather_rows_launch(x: Tensor, index: RowIndex, out: Tensor) -> KernelLaunch:
    """x (B, N, D) with unit column stride -> out (R, D)."""
    num_rows, width = out.shape
    block_d = column_block(width)
    block_rows = tile_rows(x, block_d)
    return KernelLaunch(
        kernel=_gather_rows_kernel,
        grid=(triton.cdiv(num_rows, block_rows), triton.cdiv(width, block_d)),
        arguments={
            **index.arguments(x.shape[1]),
            "x_ptr": x,
            "out_ptr": out,
            "num_rows": num_rows,
            "stride_xb": x.stride(0),
            "stride_xn": x.stride(1),
            "D": width,
            "BLOCK_ROWS": block_rows,
            "BLOCK_D": block_d,
        },
    )


def invert_rows_launch(index: RowIndex, num_tokens: int, place_to_row: Tensor) -> KernelLaunch:
    """Write r at the place of each row r of the map (B * N,) int32; leave the rest as it is."""
    num_rows = index.indices.shape[0]
    block_rows = 256
    return KernelLaunch(
        kernel=_invert_rows_kernel,
        grid=(triton.cdiv(num_rows, block_rows),),
        arguments={
            **index.arguments(num_tokens),
            "place_to_row_ptr": place_to_row,
            "num_rows": num_rows,
            "BLOCK_ROWS": block_rows,
        },
    )


def scatter_rows_launch(
    x: Tensor, fill: Tensor | None, index: RowIndex, place_to_row: Tensor, out: Tensor
) -> KernelLaunch:
    """x (R, D) and fill (B, N, D) or None, both with unit column stride -> out (B, N, D)."""
    batch, num_tokens, width = out.shape
    block_d = column_block(width)
    block_places = tile_rows(x, block_d)
    return KernelLaunch(
        kernel=_scatter_rows_kernel,
        grid=(triton.cdiv(batch * num_tokens, block_places), triton.cdiv(width, block_d)),
        arguments={
            **index.arguments(num_tokens),
            "x_ptr": x,
            "fill_ptr": fill,
            "place_to_row_ptr": place_to_row,
            "out_ptr": out,
            "num_rows": x.shape[0],
            "num_places": batch * num_tokens,
            "stride_xr": x.stride(0),
            "stride_fb": 0 if fill is None else fill.stride(0),
            "stride_fn": 0 if fill is None else fill.stride(1),
            "D": width,
            "BLOCK_PLACES": block_places,
            "BLOCK_D": block_d,
        },
    )


def fill_gradient_launch(
    grad: Tensor, index: RowIndex, place_to_row: Tensor, partial: Tensor
) -> KernelLaunch:
    """grad (B, N, D) contiguous -> partial (chunks, inner, D) sums of what the fill received."""
    batch, num_tokens, width = grad.shape
    chunks, num_inner, _ = partial.shape
    block_d = column_block(width)
    block_inner = 2048 // block_d
    num_places = batch * num_tokens
    return KernelLaunch(
        kernel=_fill_gradient_kernel,
        grid=(triton.cdiv(num_inner, block_inner), triton.cdiv(width, block_d), chunks),
        arguments={
            **index.arguments(num_tokens),
            "grad_ptr": grad,
            "place_to_row_ptr": place_to_row,
            "partial_ptr": partial,
            "num_rows": index.indices.shape[0],
            "num_places": num_places,
            "num_inner": num_inner,
            "outer_per_chunk": triton.cdiv(triton.cdiv(num_places, num_inner), chunks),
            "D": width,
            "BLOCK_INNER": block_inner,
            "BLOCK_D": block_d,
            "SUM_DTYPE": sum_dtype(grad),
        },
    )


def _inverse_map(index: RowIndex, batch: int, num_tokens: int) -> Tensor:
    """(B * N,) int32: the row at each place that has one, anything elsewhere."""
    places = torch.empty(batch * num_tokens, dtype=torch.int32, device=index.indices.device)
    invert_rows_launch(index, num_tokens, places).run()
    return places


# ----------------------------------------------------------------------------- ops


@torch.library.custom_op("masked_vit_kernels::gather_rows", mutates_args=())
def gather_rows(
    x: Tensor,
    indices: Tensor,
    sequence_ids: Tensor | None,
    rows_per_image: int,
    sequences_per_image: int,
    unique: bool,
) -> Tensor:
    """x (B, N, D) by a `RowIndex` -> (R, D); `unique` concerns the backward."""
    index = RowIndex(indices.contiguous(), sequence_ids, rows_per_image, sequences_per_image)
    out = x.new_empty(indices.shape[0], x.shape[2])
    gather_rows_launch(with_unit_columns(x), index, out).run()
    return out


@gather_rows.register_fake
def _(x, indices, sequence_ids, rows_per_image, sequences_per_image, unique):
    return x.new_empty(indices.shape[0], x.shape[2])


@torch.library.custom_op("masked_vit_kernels::scatter_rows", mutates_args=())
def scatter_rows(
    x: Tensor,
    fill: Tensor | None,
    indices: Tensor,
    sequence_ids: Tensor | None,
    rows_per_image: int,
    sequences_per_image: int,
    batch: int,
    num_tokens: int,
) -> Tensor:
    """x (R, D), fill (D,), (N, D) or (B, N, D), None for zeros -> (B, N, D)."""
    index = RowIndex(indices.contiguous(), sequence_ids, rows_per_image, sequences_per_image)
    out = x.new_empty(batch, num_tokens, x.shape[1])
    if fill is not None:
        fill = with_unit_columns(fill.to(x.dtype)).expand(out.shape)
    place_to_row = _inverse_map(index, batch, num_tokens)
    scatter_rows_launch(with_unit_columns(x), fill, index, place_to_row, out).run()
    return out


@scatter_rows.register_fake
def _(x, fill, indices, sequence_ids, rows_per_image, sequences_per_image, batch, num_tokens):
    return x.new_empty(batch, num_tokens, x.shape[1])


@torch.library.custom_op("masked_vit_kernels::accumulate_rows", mutates_args=())
def accumulate_rows(
    grad: Tensor,
    indices: Tensor,
    sequence_ids: Tensor | None,
    rows_per_image: int,
    sequences_per_image: int,
    batch: int,
    num_tokens: int,
) -> Tensor:
    """grad (R, D) -> (B, N, D): the sums of the rows that share a place, in ascending order."""
    index = RowIndex(indices, sequence_ids, rows_per_image, sequences_per_image)
    places = index.places(grad.shape[0], num_tokens, grad.device)
    total = sum_rows_by_place(grad, places, batch * num_tokens, grad.dtype)
    return total.view(batch, num_tokens, grad.shape[1])


@accumulate_rows.register_fake
def _(grad, indices, sequence_ids, rows_per_image, sequences_per_image, batch, num_tokens):
    return grad.new_empty(batch, num_tokens, grad.shape[1])


@torch.library.custom_op("masked_vit_kernels::scatter_fill_gradient", mutates_args=())
def scatter_fill_gradient(
    grad: Tensor,
    indices: Tensor,
    sequence_ids: Tensor | None,
    rows_per_image: int,
    sequences_per_image: int,
    fill_shape: list[int],
    fill_dtype: torch.dtype,
) -> Tensor:
    """grad (B, N, D) -> `fill_shape`: what the places without a row received, summed over them."""
    batch, num_tokens, width = grad.shape
    index = RowIndex(indices.contiguous(), sequence_ids, rows_per_image, sequences_per_image)
    if len(fill_shape) == 1:
        chunks, inner = min(256, triton.cdiv(batch * num_tokens, 64)), 16
    else:
        inner = num_tokens if len(fill_shape) == 2 else batch * num_tokens
        chunks = 1 if len(fill_shape) == 3 else min(8, max(batch, 1))
    partial = grad.new_empty(
        chunks, inner, width, dtype=torch.promote_types(grad.dtype, torch.float32)
    )
    place_to_row = _inverse_map(index, batch, num_tokens)
    fill_gradient_launch(grad.contiguous(), index, place_to_row, partial).run()
    if len(fill_shape) == 1:
        partial = partial.view(-1, 1, width)
    return partial.sum(0).view(fill_shape).to(fill_dtype)


@scatter_fill_gradient.register_fake
def _(grad, indices, sequence_ids, rows_per_image, sequences_per_image, fill_shape, fill_dtype):
    return grad.new_empty(fill_shape, dtype=fill_dtype)


# ----------------------------------------------------------------------------- autograd


def _save_for_gather_backward(ctx, inputs, output):
    x, indices, sequence_ids, *ctx.layout, ctx.unique = inputs
    ctx.save_for_backward(indices, sequence_ids)
    ctx.batch, ctx.num_tokens = x.shape[:2]


def _gather_backward(ctx, grad):
    indices, sequence_ids = ctx.saved_tensors
    where = (indices, sequence_ids, *ctx.layout, ctx.batch, ctx.num_tokens)
    if ctx.unique:
        grad_x = scatter_rows(grad, None, *where)
    else:
        grad_x = accumulate_rows(grad, *where)
    return grad_x, None, None, None, None, None


gather_rows.register_autograd(_gather_backward, setup_context=_save_for_gather_backward)


def _save_for_scatter_backward(ctx, inputs, output):
    _, fill, indices, sequence_ids, *ctx.layout, ctx.batch, ctx.num_tokens = inputs
    ctx.save_for_backward(indices, sequence_ids)
    ctx.fill_like = None if fill is None else (list(fill.shape), fill.dtype)


def _scatter_backward(ctx, grad):
    indices, sequence_ids = ctx.saved_tensors
    where = (indices, sequence_ids, *ctx.layout)
    grad_x = grad_fill = None
    if ctx.needs_input_grad[0]:
        grad_x = gather_rows(grad, *where, True)
    if ctx.needs_input_grad[1]:
        grad_fill = scatter_fill_gradient(grad, *where, *ctx.fill_like)
    return grad_x, grad_fill, None, None, None, None, None, None


scatter_rows.register_autograd(_scatter_backward, setup_context=_save_for_scatter_backward)


# ----------------------------------------------------------------------------- public functions


def gather_tokens(x: Tensor, indices: Tensor, packing: Packing | None = None) -> Tensor:
    """Take rows of `x` by index; -1 gives a zero row that sends no gradient.

    Args:
        x: (B, N, D) tokens, or (T, D) flat rows; any dtype, strided views are read in place when
            their columns are contiguous.
        indices: int32 or int64 and -1 for padding: (B, K) token ids of each image; (capacity,)
            token ids with a `packing` of B sequences, or of B * M (all of image 0, then of image
            1, ...); or (K,) rows of a flat `x`. Duplicates are allowed.
        packing: the layout of packed indices. With a flat `x` only its promise `unique` is used.

    Returns:
        (B, K, D), (capacity, D) or (K, D) in x's dtype. The gradient adds the rows that were taken
        more than once, always in the same order; with `packing.unique` nothing has to be sorted.

    Raises:
        ValueError: shapes that do not fit. IndexError: an id outside [-1, N), on the CPU; on CUDA,
        where a check would synchronise, such an id counts as padding.
    """
    check_same_device("x", x, indices=indices)
    if x.ndim == 2:
        check_shape("indices", indices, (None,), "(K,) for flat x (T, D)")
        tokens, index = x[None], row_index(indices[None], None, 1)
    elif x.ndim == 3:
        tokens, index = x, row_index(indices, packing, x.shape[0])
    else:
        raise ValueError(f"x must have shape (B, N, D) or (T, D), got {tuple(x.shape)}")
    if not takes_triton(x):
        return cpu.gather_tokens(x, indices, packing)
    unique = packing is not None and packing.unique
    return gather_rows(tokens, *index, unique).view(*indices.shape, x.shape[-1])


def scatter_tokens(
    x: Tensor, indices: Tensor, fill: Tensor, num_tokens: int, packing: Packing | None = None
) -> Tensor:
    """Put rows back among `num_tokens` rows of `fill`: the inverse of `gather_tokens`.

    Args:
        x: (B, K, D), or packed (capacity, D) with a `packing` of B sequences, or (K, D) flat.
        indices: int32 or int64, the shape of x without D; unique within an image, -1 for padding.
        fill: (D,), (N, D) or (B, N, D), what stands where no row is put; cast to x's dtype.
        num_tokens: N.

    Returns:
        (B, N, D), or (N, D) for flat x, in x's dtype; gradients for x and fill.

    Raises:
        ValueError: shapes that do not fit, and on the CPU two rows at one place (on CUDA one of
        them is kept). IndexError: an id outside [-1, N), on the CPU.
    """
    check_same_device("x", x, indices=indices, fill=fill)
    if x.ndim not in (2, 3):
        raise ValueError(f"x must have shape (B, K, D), (capacity, D) or (K, D), got {x.shape}")
    check_shape("indices", indices, x.shape[:-1], f"{tuple(x.shape[:-1])}")
    flat = x.ndim == 2 and packing is None
    batch = x.shape[0] if x.ndim == 3 else 1 if flat else packing.num_sequences
    index = row_index(indices[None] if flat else indices, packing, batch)
    shape = (batch, num_tokens, x.shape[-1])
    if fill.ndim not in (1, 2, 3) or tuple(fill.shape) != shape[-fill.ndim :]:
        raise ValueError(
            f"fill must have shape (D,), (N, D) or (B, N, D) of {shape}, got {fill.shape}"
        )
    if not takes_triton(x):
        return cpu.scatter_tokens(x, indices, fill, num_tokens, packing)
    out = scatter_rows(x.reshape(-1, x.shape[-1]), fill, *index, batch, num_tokens)
    return out[0] if flat else out


# ----------------------------------------------------------------------------- compile audit


def audit_cases(capability: int) -> Iterator[AuditCase]:
    """Every kernel of this file at the widths of the models."""
    from masked_vit_kernels.audit import AuditCase

    for width in (192, 384, 768, 1280, 1408):
        for dtype in (torch.bfloat16, torch.float32):
            name = f"D={width} {str(dtype).removeprefix('torch.')}"
            core = width == 1280 and dtype == torch.bfloat16
            x = torch.empty(32, 256, width, dtype=dtype, device="meta")
            rows = torch.empty(4096, width, dtype=dtype, device="meta")
            ids = torch.empty(4096, dtype=torch.int64, device="meta")
            sequences = torch.empty(4096, dtype=torch.int32, device="meta")
            places = torch.empty(32 * 256, dtype=torch.int32, device="meta")
            partial = torch.empty(8, 256, width, dtype=torch.float32, device="meta")
            index = RowIndex(ids, sequences, 1, 4)
            launches = {
                "gather packed": gather_rows_launch(x, index, rows),
                "gather dense": gather_rows_launch(x, RowIndex(ids, None, 128, 1), rows),
                "scatter zeros": scatter_rows_launch(rows, None, index, places, x),
                "scatter fill": scatter_rows_launch(rows, x[0, 0].expand_as(x), index, places, x),
                "scatter fill gradient": fill_gradient_launch(x, index, places, partial),
            }
            for kind, launch in launches.items():
                yield AuditCase(f"{kind} {name}", launch, "streaming", core)
    yield AuditCase("gather inverse map", invert_rows_launch(index, 256, places), "reported")
