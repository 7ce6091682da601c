"""Attention's cases: the launch tables, cut into ranges of lengths that launch the same kernels.

The tables are functions of the longest query and key sequence. Where they change is found by
calling them: along each axis, at powers of two and then by bisection, every length at which any
launch differs from the one before.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator

import torch

from masked_vit_kernels.attention_backward import backward_launches
from masked_vit_kernels.attention_forward import forward_launch
from masked_vit_kernels.attention_sequences import Sequences
from masked_vit_kernels.catalogue.case import Case, code_of, meta
from masked_vit_kernels.launch import KernelLaunch

HEAD_DIMS = (24, 32, 64, 80, 88)
DTYPES = (torch.bfloat16, torch.float16)
LONGEST = 1 << 20
UNBOUNDED = 2**31 - 1
_FIXED = ("keys_over", "keys_up_to")

Launches = Callable[[int, int], tuple[KernelLaunch, ...]]


def attention_cases(capability: int) -> Iterator[Case]:
    """Forward and backward, with the tile maps of packings and without."""
    for dtype, head_dim, mapped in itertools.product(DTYPES, HEAD_DIMS, (True, False)):
        keys = {"dtype": code_of(dtype), "head_dim": head_dim, "mapped": int(mapped)}
        for op, build in (("attention_forward", _forward), ("attention_backward", _backward)):
            launches = functools.cache(
                functools.partial(build, dtype, head_dim, mapped, capability)
            )
            fixed = _FIXED if build is _backward else ()
            for q, k in _cells(launches, fixed):
                bounds = {
                    "max_seqlen_k": UNBOUNDED if k == LONGEST else k,
                    "max_seqlen_q": UNBOUNDED if q == LONGEST else q,
                }
                yield Case(op, keys | bounds, launches(q, k), _budget(launches(q, k), k), fixed)


def _budget(launches: tuple[KernelLaunch, ...], longest_key: int) -> str:
    """The audit's: programs of two phases may keep a few bytes on the stack."""
    kinds = {launch.arguments.get("KIND", "forward") for launch in launches}
    within = kinds == {"forward"} or (longest_key <= 128 and "two_phase" not in kinds)
    return "matmul" if within else "matmul_two_phase"


def _side(mapped: bool, max_seqlen: int) -> Sequences:
    sequences = 32
    integers = functools.partial(meta, dtype=torch.int32)
    return Sequences(
        cu_seqlens=integers(sequences + 1),
        max_seqlen=max_seqlen,
        tile_map=integers(8, 2) if mapped else None,
        wide_tile_map=integers(8, 2) if mapped else None,
        order=integers(sequences) if mapped else None,
    )


def _forward(dtype, head_dim, mapped, capability, max_q, max_k) -> tuple[KernelLaunch, ...]:
    rows, heads = 1024, 16
    q, k, v = meta(rows, 3, heads, head_dim, dtype=dtype).unbind(1)
    launch = forward_launch(
        q=q, k=k, v=v, out=meta(rows, heads, head_dim, dtype=dtype), lse=meta(heads, rows),
        queries=_side(mapped, max_q), keys=_side(mapped, max_k), softmax_scale=head_dim**-0.5,
        capability=capability,
    )  # fmt: skip
    return (launch,)


def _backward(dtype, head_dim, mapped, capability, max_q, max_k) -> tuple[KernelLaunch, ...]:
    rows, heads = 1024, 16
    q, k, v = meta(rows, 3, heads, head_dim, dtype=dtype).unbind(1)
    out, lse = meta(rows, heads, head_dim, dtype=dtype), meta(heads, rows)
    launches = backward_launches(
        q=q, k=k, v=v, out=out, dout=out, lse=lse, delta=lse, dq=q, dk=k, dv=v,
        queries=_side(mapped, max_q), keys=_side(mapped, max_k), softmax_scale=head_dim**-0.5,
        capability=capability,
    )  # fmt: skip
    return tuple(launches)


def _fingerprint(launches: tuple[KernelLaunch, ...], fixed: tuple[str, ...]) -> tuple:
    """What makes two launch lists the same kernels: constexprs, options, arguments of the table."""
    return tuple(
        (
            launch.kernel,
            *(v for k, v in launch.arguments.items() if k.isupper() or k in fixed),
            *launch.options.items(),
        )
        for launch in launches
    )


def _cells(launches: Launches, fixed: tuple[str, ...]) -> list[tuple[int, int]]:
    """(longest query, longest key) of every range of lengths, queries varying fastest."""
    samples = sorted({1, 16, 48, LONGEST} | {2**i for i in range(5, 12)} | {96, 192, 384})

    def same_at(q: int, k: int) -> tuple:
        return _fingerprint(launches(q, k), fixed)

    ends_q = _last_lengths(lambda q: tuple(same_at(q, k) for k in samples))
    ends_k = _last_lengths(lambda k: tuple(same_at(q, k) for q in samples))
    generator = random.Random(0)
    for _ in range(200):
        q, k = (int(2 ** generator.uniform(0, 11)) for _ in range(2))
        cell = (min(end for end in ends_q if end >= q), min(end for end in ends_k if end >= k))
        if same_at(q, k) != same_at(*cell):
            raise AssertionError(f"lengths {q}, {k} launch other kernels than their range {cell}")
    return [(q, k) for k in ends_k for q in ends_q]


def _last_lengths(kernels_at: Callable[[int], tuple]) -> list[int]:
    """Every length after which `kernels_at` changes, and LONGEST."""
    ends = [LONGEST]

    def search(low: int, high: int) -> None:
        if kernels_at(low) == kernels_at(high):
            return
        if high == low + 1:
            ends.append(low)
            return
        middle = (low + high) // 2
        search(low, middle)
        search(middle, high)

    for low, high in itertools.pairwise([1] + [2**i for i in range(1, 21)]):
        search(low, high)
    return sorted(ends)
