"""What the attention kernels share: head-dim pieces, launch table, tiles in and out of memory.

`tl.arange` takes powers of two and a half-precision matrix product wants at least 16 of them, so a
head of width D is cut into two pieces where they are narrower together than the next power of two:
80 = 64 + 16, 88 = 64 + 32 (24 used), 40 = 32 + 16 (8 used); 24 is one piece of 32, as wide as
16 + 16 and fewer registers. A product over D is the sum of two products; an output of width D is
two tiles.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from masked_vit_kernels.launch import round_up_to_power_of_two
from masked_vit_kernels.packing import TILE, WIDE_TILE

MAX_HEAD_DIM = 128
WIDEST_TUNED = 88  # wider heads run smaller tiles that are sure to fit

# Programs a head that clear the rows after the last sequence; each strides over them.
CLEARING_PROGRAMS = 4
CLEARING_ROWS = 64

NO_LIMIT = 2**31 - 1  # as a number of keys
MAX_GRID_Y = 65535  # of CUDA


@dataclass(frozen=True)
class AttentionConfig:
    """Tile and schedule of one attention kernel.

    Attributes:
        block_q: query rows a tile.
        block_k: key rows a tile.
        num_warps: warps a program.
        num_stages: depth of the software pipeline over the inner loop.
        max_registers: cap per thread; None: ptxas' choice.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


@dataclass(frozen=True)
class BackwardStep:
    """One launch of the backward: a kernel and the sequences it takes.

    Attributes:
        kind: "resident" (one program per sequence and head, all keys on chip, five products),
            "two_phase" (one program per sequence and head, seven products), "flash_queries" and
            "flash_keys" (one program per tile and head).
        config: its tiles.
        keys_over: takes sequences of more keys than this (-1: all).
        keys_up_to: and of at most so many.
    """

    kind: str
    config: AttentionConfig
    keys_over: int = -1
    keys_up_to: int = NO_LIMIT


def head_dim_pieces(head_dim: int) -> tuple[int, int]:
    """Powers of two, at least 16, that cover `head_dim`; the second is 0 where one is enough."""
    padded = max(round_up_to_power_of_two(head_dim), 16)
    main = padded // 2
    rest = max(round_up_to_power_of_two(head_dim - main), 16)
    return (main, rest) if main >= 16 and main + rest < padded else (padded, 0)


def forward_config(
    head_dim: int, max_seqlen_q: int, max_seqlen_k: int, dtype: torch.dtype, capability: int
) -> AttentionConfig:
    """Tile of the forward for sequences of at most so many queries and keys.

    Keys that fit one tile are attended to in one pass. block_q is `TILE` or `WIDE_TILE`.
    """
    if dtype == torch.float32:
        # 64 + 32 columns of tf32x3 products beside 64 keys overflow Blackwell's tensor memory.
        narrow_keys = capability == 100 and 80 < head_dim <= 96
        return AttentionConfig(TILE, 32 if narrow_keys else 64, 4, 1)
    if max_seqlen_k <= 64:
        # Four programs a multiprocessor; left alone, ptxas takes registers for three.
        registers = 128 if capability == 80 and 64 < head_dim <= 80 else None
        return AttentionConfig(TILE, 64, 4, 1, registers)
    if max_seqlen_k <= 128:
        # 64 x 128 scores beside 80 output columns spill where mma.sync holds both operands.
        if capability == 80 and head_dim > 64:
            return AttentionConfig(WIDE_TILE, 64, 8, 2)
        return AttentionConfig(TILE, 128, 4, 1)
    if head_dim <= 32 or max_seqlen_q <= 128:
        return AttentionConfig(TILE, 64, 4, 2)
    # Wide tiles read each key tile half as often from L2, which is what these lengths wait for.
    return AttentionConfig(WIDE_TILE, 64, 8, 2, 128 if capability == 90 else None)


def backward_plan(
    head_dim: int, max_seqlen_q: int, max_seqlen_k: int, dtype: torch.dtype, capability: int
) -> tuple[BackwardStep, ...]:
    """Launches of the backward; together they take every sequence exactly once.

    Tiles are the largest whose accumulators stay in registers and, on Blackwell, in tensor memory;
    the compile audit checks it. Caps on registers are set where a cap costs no spill and lets
    another program onto the multiprocessor.
    """
    if dtype == torch.float32:
        if max_seqlen_k > 256 and capability != 100:
            return _flash(AttentionConfig(64, 32, 4, 1), AttentionConfig(32, 64, 4, 1))
        if max_seqlen_k <= 64:
            return (BackwardStep("resident", AttentionConfig(64, 64, 4, 1)),)
        # tf32 products with 64 rows overflow Blackwell's tensor memory at D=128, flash's too; those
        # with 32 rows run on mma.sync. Wide heads overflow Ampere's shared memory with 64 rows.
        narrow = capability == 100 or (capability == 80 and head_dim > WIDEST_TUNED)
        rows = 32 if narrow else 64
        return (BackwardStep("two_phase", AttentionConfig(rows, rows, 4, 1)),)
    # No Ampere program holds a whole sequence of D=88: two launches of 64-row tiles do not spill.
    if max_seqlen_k > 256 or (max_seqlen_k > 64 and capability == 80 and head_dim > 80):
        if head_dim > WIDEST_TUNED:
            return _flash(AttentionConfig(64, 64, 8, 1), AttentionConfig(32, 64, 8, 1))
        if capability == 80:
            queries = AttentionConfig(64, 64, 4 if head_dim <= 80 else 8, 2)
            return _flash(queries, AttentionConfig(64, 64, 4, 2))
        return _flash(AttentionConfig(64, 64, 4, 2), AttentionConfig(64, 128, 8, 2))
    if max_seqlen_k <= 64 and max_seqlen_q <= 64:
        return (BackwardStep("resident", _one_tile(head_dim, capability)),)
    short, long = _up_to_128_keys(head_dim, capability), _up_to_256_keys(head_dim, capability)
    if max_seqlen_k <= 128:
        return (short,)
    if short == long or head_dim <= 32:  # one launch: by the estimate two phases suit the short too
        return (long,)
    return (
        dataclasses.replace(long, keys_over=128),
        dataclasses.replace(short, keys_up_to=128),
    )


def _one_tile(head_dim: int, capability: int) -> AttentionConfig:
    if capability == 80 or head_dim > WIDEST_TUNED:
        return AttentionConfig(64, 64, 4 if head_dim < 64 else 8, 1)
    registers = 128 if head_dim <= 32 else 168 if head_dim <= 64 else None
    return AttentionConfig(64, 64, 4, 1, registers)


def _up_to_128_keys(head_dim: int, capability: int) -> BackwardStep:
    if head_dim <= 32:
        return BackwardStep("resident", AttentionConfig(32, 128, 8, 1, 128))
    if head_dim > (64 if capability == 80 else WIDEST_TUNED):
        return BackwardStep("two_phase", AttentionConfig(32, 64, 8, 1))
    half_tile = capability == 80 or (capability == 100 and head_dim > 64)
    return BackwardStep("resident", AttentionConfig(32 if half_tile else 64, 128, 8, 1))


def _up_to_256_keys(head_dim: int, capability: int) -> BackwardStep:
    if head_dim <= 32:
        return BackwardStep("two_phase", AttentionConfig(64, 64, 4, 1, 168))
    if capability == 80 or head_dim > WIDEST_TUNED:
        return BackwardStep("two_phase", AttentionConfig(32, 64, 8, 1))
    # 4 warps share a 64-row product without repeating work; D=88 spills with them on Hopper.
    warps = 8 if capability == 90 and head_dim > 80 else 4
    return BackwardStep("two_phase", AttentionConfig(64, 64, warps, 1))


def _flash(queries: AttentionConfig, keys: AttentionConfig) -> tuple[BackwardStep, ...]:
    return (BackwardStep("flash_queries", queries), BackwardStep("flash_keys", keys))


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
