"""What the attention kernels share: head-dim pieces, grids, tiles in and out of memory.

`tl.arange` takes powers of two and a half-precision matrix product wants at least 16 of them, so a
head of width D is cut into two pieces where they are narrower together than the next power of two:
80 = 64 + 16, 88 = 64 + 32 (24 used), 40 = 32 + 16 (8 used); 24 is one piece of 32, as wide as
16 + 16 and fewer registers. A product over D is the sum of two products; an output of width D is
two tiles.
"""

from __future__ import annotations

from torch import Tensor

from masked_vit_kernels.kernel_language import tl, triton
from masked_vit_kernels.launch import round_up_to_power_of_two

# Programs a head that clear the rows after the last sequence; each strides over them.
CLEARING_PROGRAMS = 4
CLEARING_ROWS = 64

MAX_GRID_Y = 65535  # of CUDA


def head_dim_pieces(head_dim: int) -> tuple[int, int]:
    """Powers of two, at least 16, that cover `head_dim`; the second is 0 where one is enough."""
    padded = max(round_up_to_power_of_two(head_dim), 16)
    main = padded // 2
    rest = max(round_up_to_power_of_two(head_dim - main), 16)
    return (main, rest) if main >= 16 and main + rest < padded else (padded, 0)


def attention_grid(num_heads: int, num_programs: int) -> tuple[int, int, int]:
    """Programs a head on axes 1 and 2 (an axis but the first ends at 65535), heads fastest.

    Programs past `num_programs` repeat the clearing of the padding rows.
    """
    layers = max(1, -(-num_programs // MAX_GRID_Y))
    return num_heads, -(-num_programs // layers), layers


def per_run(*names: str, strides: str) -> list[str]:
    """Parameters not to specialise: counts, and the token strides of the views in `strides`.

    A stride over 8 says all that 16-byte loads need to know: one compiled kernel serves every
    number of heads.
    """
    return [*names, *(f"stride_{name}t_by_8" for name in strides.split())]


def stride_arguments(name: str, x: Tensor) -> dict[str, int]:
    """Kernel arguments of a (T, H, D) view: its token stride over 8, its head stride."""
    return {f"stride_{name}t_by_8": x.stride(0) // 8, f"STRIDE_{name.upper()}H": x.stride(1)}


def readable(x: Tensor) -> Tensor:
    """`x` (T, H, D) itself where the kernels can read it with 16-byte loads, else a copy."""
    aligned = x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 and x.data_ptr() % 16 == 0
    return x if x.stride(2) == 1 and aligned else x.contiguous()


@triton.jit
def load_tile(
    ptr, first_row, num_rows, stride_t, ROWS: tl.constexpr, COLUMN: tl.constexpr,
    WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """[ROWS, WIDTH] of rows from `first_row` on, zero from `num_rows` and from HEAD_DIM on."""
    rows = tl.arange(0, ROWS)
    columns = COLUMN + tl.arange(0, WIDTH)
    mask = (rows < num_rows - first_row)[:, None]
    if COLUMN + WIDTH > HEAD_DIM:
        mask = mask & (columns < HEAD_DIM)[None, :]
    tile_ptr = ptr + tl.full((), first_row, tl.int64) * stride_t
    return tl.load(tile_ptr + rows[:, None] * stride_t + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(
    ptr, tile, first_row, num_rows, stride_t, ROWS: tl.constexpr, COLUMN: tl.constexpr,
    WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Write [ROWS, WIDTH], rows before `num_rows` and columns before HEAD_DIM only."""
    rows = tl.arange(0, ROWS)
    columns = COLUMN + tl.arange(0, WIDTH)
    mask = (rows < num_rows - first_row)[:, None]
    if COLUMN + WIDTH > HEAD_DIM:
        mask = mask & (columns < HEAD_DIM)[None, :]
    tile_ptr = ptr + tl.full((), first_row, tl.int64) * stride_t
    tl.store(
        tile_ptr + rows[:, None] * stride_t + columns[None, :],
        tile.to(ptr.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def clear_rows(
    ptr, first_row, num_rows, stride_t, part, PARTS: tl.constexpr, ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Zero one head's rows from `first_row` to `num_rows`, every PARTS-th block of ROWS."""
    zeros = tl.zeros((ROWS, WIDTH), tl.float32)
    for row in range(first_row + part * ROWS, num_rows, PARTS * ROWS):
        store_tile(ptr, zeros, row, num_rows, stride_t, ROWS, 0, WIDTH, HEAD_DIM)
