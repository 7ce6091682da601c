"""The launch tables of attention: tiles and schedule of every kernel, by lengths, dtype and GPU."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from masked_vit_kernels.packing import TILE, WIDE_TILE

MAX_HEAD_DIM = 128
WIDEST_TUNED = 88  # wider heads run smaller tiles that are sure to fit

NO_LIMIT = 2**31 - 1  # as a number of keys


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
    if capability == 90 and head_dim <= WIDEST_TUNED:
        return _hopper_forward(head_dim, max_seqlen_k)
    if max_seqlen_k <= 128:
        # 64 x 128 scores beside 80 output columns spill where mma.sync holds both operands.
        if capability == 80 and head_dim > 64:
            return AttentionConfig(WIDE_TILE, 64, 8, 2)
        return AttentionConfig(TILE, 128, 4, 1)
    if head_dim <= 32 or max_seqlen_q <= 128:
        return AttentionConfig(TILE, 64, 4, 2)
    # Wide tiles read each key tile half as often from L2, which is what these lengths wait for.
    return AttentionConfig(WIDE_TILE, 64, 8, 2, 128 if capability == 90 else None)


def _hopper_forward(head_dim: int, max_seqlen_k: int) -> AttentionConfig:
    """Over 64 keys on sm_90, by the model of bench/ops/machine_time.py: no GPU has timed these.

    Programs wait for each other's latencies, so what counts is how many share a multiprocessor:
    caps on registers, short tiles of keys (which also fit the last keys better), three stages.
    """
    if head_dim <= 32:
        return AttentionConfig(TILE, 64, 4, 3, 80)
    if head_dim > 80:
        return AttentionConfig(TILE, 32, 4, 3, 128)
    if max_seqlen_k <= 224:
        return AttentionConfig(TILE, 32, 4, 3, 96)
    # Wide tiles read each key tile half as often from L2, which is what these lengths wait for.
    return AttentionConfig(WIDE_TILE, 64, 8, 3, 128)


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
    if max_seqlen_k <= 64 and max_seqlen_q <= 64:
        return (BackwardStep("resident", _one_tile(head_dim, capability)),)
    if capability == 90 and head_dim <= WIDEST_TUNED:
        return _hopper_backward(head_dim)
    # No Ampere program holds a whole sequence of D=88: two launches of 64-row tiles do not spill.
    if max_seqlen_k > 256 or (max_seqlen_k > 64 and capability == 80 and head_dim > 80):
        if head_dim > WIDEST_TUNED:
            return _flash(AttentionConfig(64, 64, 8, 1), AttentionConfig(32, 64, 8, 1))
        if capability == 80:
            queries = AttentionConfig(64, 64, 4 if head_dim <= 80 else 8, 2)
            return _flash(queries, AttentionConfig(64 if head_dim <= 80 else 32, 64, 4, 2))
        return _flash(AttentionConfig(64, 64, 4, 2), AttentionConfig(64, 128, 8, 2))
    short, long = _up_to_128_keys(head_dim, capability), _up_to_256_keys(head_dim, capability)
    if max_seqlen_k <= 128:
        return (short,)
    if short == long or head_dim <= 32:  # one launch: by the estimate two phases suit the short too
        return (long,)
    return (
        dataclasses.replace(long, keys_over=128),
        dataclasses.replace(short, keys_up_to=128),
    )


def _hopper_backward(head_dim: int) -> tuple[BackwardStep, ...]:
    """Over 64 keys on sm_90, by the model of bench/ops/machine_time.py: no GPU has timed these.

    One program a tile and seven products, whatever the length: five products and one program a
    sequence leave one or two programs on a multiprocessor, and those wait.
    """
    if head_dim <= 32:
        stages = 3 if head_dim <= 24 else 2
        return _flash(AttentionConfig(64, 32, 4, 3, 80), AttentionConfig(32, 64, 4, stages, 80))
    if head_dim <= 64:
        return _flash(AttentionConfig(64, 32, 4, 3, 96), AttentionConfig(32, 64, 4, 2, 128))
    if head_dim <= 80:
        return _flash(AttentionConfig(64, 32, 4, 3, 128), AttentionConfig(32, 64, 4, 2, 168))
    return _flash(AttentionConfig(64, 32, 4, 3, 168), AttentionConfig(32, 64, 4, 3))


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
    # 4 warps share a 64-row product without repeating work.
    return BackwardStep("two_phase", AttentionConfig(64, 64, 4, 1))


def _flash(queries: AttentionConfig, keys: AttentionConfig) -> tuple[BackwardStep, ...]:
    return (BackwardStep("flash_queries", queries), BackwardStep("flash_keys", keys))
