"""Attention's cases: the launch tables, cut into ranges of lengths that launch the same kernels.

The tables are functions of the longest query and key sequence. Where they change is found by
calling them: along each axis, at powers of two and then by bisection, every length at which any
launch differs from the one before.

The library holds the tuned head dims in half precision. Only audited besides: float32, the widest
heads, and heads of queries that share keys.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from masked_vit_kernels.attention.backward import backward_launches
from masked_vit_kernels.attention.config import MAX_HEAD_DIM, WIDEST_TUNED
from masked_vit_kernels.attention.forward import forward_launch
from masked_vit_kernels.attention.sequences import Sequences
from masked_vit_kernels.catalogue.case import UNBOUNDED, Case, Keys, meta
from masked_vit_kernels.catalogue.sizes import HEAD_DIMS
from masked_vit_kernels.launch import KernelLaunch
from masked_vit_kernels.packing import TILE, WIDE_TILE

LONGEST = 1 << 20
LENGTHS = (64, 128, 256, 512)  # of the core cases and of those that are only audited
_FIXED = ("keys_over", "keys_up_to")

Launches = Callable[[int, int], tuple[KernelLaunch, ...]]


def attention_cases(capability: int) -> Iterator[Case]:
    """Forward and backward of qkv views, as a ViT's qkv projection writes them."""
    for dtype, head_dim, mapped in itertools.product(
        (torch.bfloat16, torch.float16), HEAD_DIMS, (True, False)
    ):
        yield from _library_cases(dtype, head_dim, mapped, capability)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for head_dim in (*HEAD_DIMS, MAX_HEAD_DIM):
            if dtype == torch.float32 or head_dim not in HEAD_DIMS:
                yield from _audited_cases(dtype, head_dim, capability)
    for head_dim in HEAD_DIMS:
        yield from _audited_cases(torch.bfloat16, head_dim, capability, group=4)


def _library_cases(
    dtype: torch.dtype, head_dim: int, mapped: bool, capability: int
) -> Iterator[Case]:
    """Every range of lengths, with the tile maps of packings or without."""
    for op, build in _OPS.items():
        launches = functools.cache(functools.partial(build, dtype, head_dim, mapped, capability))
        fixed = _FIXED if build is _backward else ()
        ends_q, ends_k = _ends(build, head_dim, capability, fixed)
        _check_ranges(launches, ends_q, ends_k, fixed)
        core = {
            (_range_of(length, ends_q), _range_of(length, ends_k))
            for length in LENGTHS
            if mapped and _is_core(dtype, head_dim, length, capability)
        }
        for k, q in itertools.product(ends_k, ends_q):
            yield Case(
                op, _keys(dtype, head_dim, mapped, q, k), launches(q, k),
                tuple(map(_budget, launches(q, k))), fixed, core=(q, k) in core,
            )  # fmt: skip


def _audited_cases(
    dtype: torch.dtype, head_dim: int, capability: int, group: int = 1
) -> Iterator[Case]:
    for (op, build), length in itertools.product(_OPS.items(), LENGTHS):
        launches = build(dtype, head_dim, True, capability, length, length, group)
        keys = _keys(dtype, head_dim, True, length, length)
        core = _is_core(dtype, head_dim, length, capability)
        if group > 1:
            keys, core = keys | {"group": group}, (head_dim, length) == (64, 256)
        yield Case(
            op, keys, launches, tuple(map(_budget, launches)), core=core, in_library=False
        )


def _keys(dtype: torch.dtype, head_dim: int, mapped: bool, longest_q: int, longest_k: int) -> Keys:
    return {
        "dtype": dtype,
        "head_dim": head_dim,
        "mapped": int(mapped),
        "max_seqlen_k": UNBOUNDED if longest_k == LONGEST else longest_k,
        "max_seqlen_q": UNBOUNDED if longest_q == LONGEST else longest_q,
    }


def _budget(launch: KernelLaunch) -> str:
    """A kernel's, whatever lengths it serves: two phases alone may keep a few bytes on the stack.

    Measured over every tuned half-precision kernel: the two-phase ones have up to 24 bytes there,
    none touched in a loop, all others have none.
    """
    q = launch.arguments["q_ptr"]
    assert isinstance(q, Tensor)
    if q.dtype == torch.float32 or q.shape[2] > WIDEST_TUNED:
        return "reported"
    return "matmul_two_phase" if launch.arguments.get("KIND") == "two_phase" else "matmul"


# The float32 tiles that come closest to the limits of shared and tensor memory.
_WIDEST_FLOAT32 = ((80, 128), (100, 88), (100, 128))


def _is_core(dtype: torch.dtype, head_dim: int, max_seqlen: int, capability: int) -> bool:
    """The narrowest and widest tuned heads everywhere; on Hopper D=80, long and fp16 as well."""
    if dtype == torch.float32 and max_seqlen == 128 and (capability, head_dim) in _WIDEST_FLOAT32:
        return True
    if dtype != torch.bfloat16:
        return capability == 90 and head_dim == 32 and max_seqlen == 128
    if capability == 90 and head_dim == 80:
        return True
    return head_dim in (24, 88) and max_seqlen in (
        (128, 256, 512) if capability == 90 else (128, 256)
    )


_ROWS, _HEADS, _SEQUENCES = 1024, 16, 32  # any numbers: the kernels are not told


def _side(mapped: bool, max_seqlen: int) -> Sequences:
    integers = functools.partial(meta, dtype=torch.int32)
    cu_seqlens = integers(_SEQUENCES + 1)
    if not mapped:
        return Sequences(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    return Sequences(
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        tile_map=integers(_ROWS // TILE + _SEQUENCES, 2),
        wide_tile_map=integers(_ROWS // WIDE_TILE + _SEQUENCES, 2),
        order=integers(_SEQUENCES),
    )


def _views(dtype: torch.dtype, head_dim: int, group: int) -> tuple[Tensor, ...]:
    """q, k and v as a projection writes them: of one tensor, or the keys of fewer heads."""
    if group == 1:
        return meta(_ROWS, 3, _HEADS, head_dim, dtype=dtype).unbind(1)
    kv = meta(_ROWS, 2, _HEADS // group, head_dim, dtype=dtype)
    return meta(_ROWS, _HEADS, head_dim, dtype=dtype), *kv.unbind(1)


def _forward(
    dtype, head_dim, mapped, capability, max_q, max_k, group=1
) -> tuple[KernelLaunch, ...]:
    q, k, v = _views(dtype, head_dim, group)
    launch = forward_launch(
        q=q, k=k, v=v, out=meta(_ROWS, _HEADS, head_dim, dtype=dtype), lse=meta(_HEADS, _ROWS),
        queries=_side(mapped, max_q), keys=_side(mapped, max_k), softmax_scale=head_dim**-0.5,
        capability=capability,
    )  # fmt: skip
    return (launch,)


def _backward(
    dtype, head_dim, mapped, capability, max_q, max_k, group=1
) -> tuple[KernelLaunch, ...]:
    q, k, v = _views(dtype, head_dim, group)
    out, lse = meta(_ROWS, _HEADS, head_dim, dtype=dtype), meta(_HEADS, _ROWS)
    launches = backward_launches(
        q=q, k=k, v=v, out=out, dout=out, lse=lse, delta=lse, dq=q,
        dk=k if group == 1 else out, dv=v if group == 1 else out,
        queries=_side(mapped, max_q), keys=_side(mapped, max_k), softmax_scale=head_dim**-0.5,
        capability=capability,
    )  # fmt: skip
    return tuple(launches)


_OPS = {"attention_forward": _forward, "attention_backward": _backward}


def launches_of(
    dtype: torch.dtype, head_dim: int, longest: int, capability: int
) -> tuple[KernelLaunch, ...]:
    """Forward and backward of packings whose sequences are at most so long."""
    built = [of(dtype, head_dim, True, capability, longest, longest) for of in _OPS.values()]
    return tuple(itertools.chain(*built))


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


@functools.cache
def _ends(
    build: Callable[..., tuple[KernelLaunch, ...]],
    head_dim: int,
    capability: int,
    fixed: tuple[str, ...],
) -> tuple[list[int], list[int]]:
    """The longest query and the longest key of every range of lengths.

    They are looked for in bfloat16 without maps: `_check_ranges` sees that the others share them.
    """
    launches = functools.cache(
        functools.partial(build, torch.bfloat16, head_dim, False, capability)
    )
    samples = sorted({1, 16, 48, LONGEST} | {2**i for i in range(5, 12)} | {96, 192, 384})

    def same_at(q: int, k: int) -> tuple:
        return _fingerprint(launches(q, k), fixed)

    ends_q = _last_lengths(lambda q: tuple(same_at(q, k) for k in samples))
    ends_k = _last_lengths(lambda k: tuple(same_at(q, k) for q in samples))
    return ends_q, ends_k


def _check_ranges(
    launches: Launches, ends_q: list[int], ends_k: list[int], fixed: tuple[str, ...]
) -> None:
    """Draw lengths and raise where they launch other kernels than the end of their range does."""
    generator = random.Random(0)
    for _ in range(200):
        q, k = (int(2 ** generator.uniform(0, 11)) for _ in range(2))
        cell = (_range_of(q, ends_q), _range_of(k, ends_k))
        if _fingerprint(launches(q, k), fixed) != _fingerprint(launches(*cell), fixed):
            raise AssertionError(f"lengths {q}, {k} launch other kernels than their range {cell}")


def _range_of(length: int, ends: list[int]) -> int:
    return min(end for end in ends if end >= length)


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
