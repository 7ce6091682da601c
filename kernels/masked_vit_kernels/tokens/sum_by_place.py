"""Sums over equal places: the gradient of taking a row more than once.

    out[p] = sum over r with places[r] == p, in a fixed order, of values[r]

A stable sort brings the rows of a place together, and one program sums them in float32: no atomics,
the same bits in every run. Bytes moved: every value once, plus 12 bytes of sort a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from masked_vit_kernels.kernel_language import tl, triton
from masked_vit_kernels.launch import KernelLaunch
from masked_vit_kernels.tokens.rows import column_block, sum_dtype, with_unit_columns

MANY_ROWS = 4  # rows a place on average, above which a sum takes one place a program


@triton.jit(do_not_specialize=["num_places"])
def _segmented_sum_kernel(
    values_ptr,  # (R, D)
    order_ptr,  # (R,) int64: rows sorted by place
    starts_ptr,  # (P + 1,) int64: first entry of each place in `order`
    out_ptr,  # (P, D)
    num_places,
    stride_vr,
    D: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * BLOCK_PLACES + tl.arange(0, BLOCK_PLACES)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_range = places < num_places
    in_width = columns < D
    first = tl.load(starts_ptr + places, mask=in_range, other=0)
    last = tl.load(starts_ptr + places + 1, mask=in_range, other=0)

    total = tl.zeros((BLOCK_PLACES, BLOCK_ROWS, BLOCK_D), dtype=SUM_DTYPE)
    for step in range(0, tl.max(last - first, axis=0), BLOCK_ROWS):
        entries = first[:, None] + step + tl.arange(0, BLOCK_ROWS)[None, :]  # [PLACES, ROWS]
        present = entries < last[:, None]
        rows = tl.load(order_ptr + entries, mask=present, other=0)
        total += tl.load(  # [BLOCK_PLACES, BLOCK_ROWS, BLOCK_D]
            values_ptr + rows[:, :, None] * stride_vr + columns[None, None, :],
            mask=present[:, :, None] & in_width[None, None, :],
            other=0,
        ).to(SUM_DTYPE)
    tl.store(
        out_ptr + places[:, None] * D + columns[None, :],
        tl.sum(total, axis=1).to(out_ptr.dtype.element_ty),
        mask=in_range[:, None] & in_width[None, :],
    )


def segmented_sum_launch(
    values: Tensor, order: Tensor, starts: Tensor, out: Tensor
) -> KernelLaunch:
    """values (R, D) with unit column stride, order (R,), starts (P + 1,) -> out (P, D)."""
    num_places, width = out.shape
    block_d = column_block(width)
    block = max(1, 2048 // block_d)
    many_rows_each = order.shape[0] > MANY_ROWS * num_places
    block_places, block_rows = (1, block) if many_rows_each else (block, 1)
    return KernelLaunch(
        kernel=_segmented_sum_kernel,
        grid=(triton.cdiv(num_places, block_places), triton.cdiv(width, block_d)),
        arguments={
            "values_ptr": values,
            "order_ptr": order,
            "starts_ptr": starts,
            "out_ptr": out,
            "num_places": num_places,
            "stride_vr": values.stride(0),
            "D": width,
            "BLOCK_PLACES": block_places,
            "BLOCK_ROWS": block_rows,
            "BLOCK_D": block_d,
            "SUM_DTYPE": sum_dtype(values),
        },
    )


def sum_rows_by_place(
    values: Tensor, places: Tensor, num_places: int, dtype: torch.dtype
) -> Tensor:
    """values (R, D), places (R,) int64 -> (num_places, D) sums in `dtype`, without a host sync.

    Rows whose place lies outside [0, num_places) are left out, whatever they hold.
    """
    values = with_unit_columns(values)
    inside = (places >= 0) & (places < num_places)
    # int32 keys take half the passes of a radix sort
    key_dtype = torch.int32 if num_places < 2**31 - 1 else torch.int64
    keys = torch.where(inside, places, num_places).to(key_dtype)
    keys, order = torch.sort(keys, stable=True)
    every_place = torch.arange(num_places + 1, dtype=key_dtype, device=places.device)
    starts = torch.searchsorted(keys, every_place)
    out = torch.empty(num_places, values.shape[1], dtype=dtype, device=values.device)
    segmented_sum_launch(values, order, starts, out).run()
    return out
