"""Kernels of gather and scatter and how they are launched; `gather.py` has the maths.

A scatter inverts the index first: `place_to_row[place] = r` is written for the places that are
taken and *nowhere else*. A reader trusts an entry only if its row leads back to the place (the
sparse set of Briggs and Torczon), so the map is never cleared and every row of the result, zeros or
fill included, is written once in one launch.
"""

from __future__ import annotations

from torch import Tensor

from masked_vit_kernels.kernel_language import tl, triton
from masked_vit_kernels.launch import KernelLaunch
from masked_vit_kernels.tokens.rows import (
    ROW_COUNTS,
    RowIndex,
    column_block,
    locate_rows,
    sum_dtype,
    tile_rows,
)

# ----------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=ROW_COUNTS)
def _gather_rows_kernel(
    x_ptr,  # (B, N, D)
    indices_ptr,  # (R,)
    sequence_ids_ptr,  # (R,) or None
    out_ptr,  # (R, D)
    num_rows,
    num_tokens,
    rows_per_image,
    sequences_per_image,
    stride_xb,
    stride_xn,
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
        num_tokens, rows_per_image, sequences_per_image,
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


@triton.jit(do_not_specialize=ROW_COUNTS)
def _invert_rows_kernel(
    indices_ptr,  # (R,)
    sequence_ids_ptr,  # (R,) or None
    place_to_row_ptr,  # (B * N,) int32
    num_rows,
    num_tokens,
    rows_per_image,
    sequences_per_image,
    BLOCK_ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    images, tokens, taken = locate_rows(
        rows, rows < num_rows, indices_ptr, sequence_ids_ptr,
        num_tokens, rows_per_image, sequences_per_image,
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
    sequences_per_image,
):
    """The row that lies at each place (int64), and whether one does.

    The map holds anything where nothing was written: an entry counts if its row leads back here.
    """
    rows = tl.load(place_to_row_ptr + places, mask=in_range, other=-1).to(tl.int64)
    possible = in_range & (rows >= 0) & (rows < num_rows)
    images, tokens, taken = locate_rows(
        rows, possible, indices_ptr, sequence_ids_ptr,
        num_tokens, rows_per_image, sequences_per_image,
    )  # fmt: skip
    return rows, taken & (images * num_tokens + tokens == places)


@triton.jit(do_not_specialize=[*ROW_COUNTS, "num_places"])
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
    sequences_per_image,
    stride_xr,
    stride_fb,
    stride_fn,
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
        num_rows, num_tokens, rows_per_image, sequences_per_image,
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


@triton.jit(do_not_specialize=[*ROW_COUNTS, "num_places", "num_inner", "outer_per_chunk"])
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
    sequences_per_image,
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
            num_rows, num_tokens, rows_per_image, sequences_per_image,
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
    num_rows = index.given_ids.shape[0]
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
            "num_rows": index.given_ids.shape[0],
            "num_places": num_places,
            "num_inner": num_inner,
            "outer_per_chunk": triton.cdiv(triton.cdiv(num_places, num_inner), chunks),
            "D": width,
            "BLOCK_INNER": block_inner,
            "BLOCK_D": block_d,
            "SUM_DTYPE": sum_dtype(grad),
        },
    )
