"""What `varlen_attention` takes, checked before it is known where it will run.

The rules are one set for the CPU and for a GPU, so that what runs on one runs on the other; only
float64, in which tests hold the CPU path to the reference, has no kernel. Whether the sequences fit
their bounds is in the tensors' values: the CPU always looks, a GPU does with
`MASKED_VIT_KERNELS_CHECK=1`, which waits for the device at every call.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from masked_vit_kernels.attention.config import MAX_HEAD_DIM
from masked_vit_kernels.packing import Packing


class Side(NamedTuple):
    """The queries' or the keys' sequences, as the caller describes them."""

    name: str  # "q", "k" or "" where both are one
    rows: int
    cu_seqlens: Tensor
    max_seqlen: int
    packing: Packing | None

    @property
    def suffix(self) -> str:
        """What its arguments' names end in."""
        return f"_{self.name}" if self.name else ""


def check_attention(head_dim: int, softmax_scale: float | None, *sides: Side) -> None:
    """Raise ValueError for a head dim, scale or sequences that a kernel could not take."""
    check_head_dim(head_dim)
    check_scale(softmax_scale)
    for side in sides:
        check_bound(side)
        if reads_values(side.cu_seqlens):
            check_sequences(side)


def check_head_dim(head_dim: int) -> None:
    """D must be a multiple of 8 up to 128."""
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"D must be a multiple of 8 up to {MAX_HEAD_DIM}, got {head_dim}: choose another "
            "number of heads"
        )


def check_scale(softmax_scale: float | None) -> None:
    """The scale must be positive and finite; None is the default."""
    if not isinstance(softmax_scale, int | float | torch.SymFloat | None):
        kind = type(softmax_scale).__name__
        raise TypeError(f"softmax_scale must be a float, got {kind}")
    if softmax_scale is not None and not 0 < softmax_scale < math.inf:
        raise ValueError(f"softmax_scale must be positive and finite, got {softmax_scale}")


def check_bound(side: Side) -> None:
    """The bound of the lengths must be an int that is not negative."""
    if not isinstance(side.max_seqlen, int | torch.SymInt):
        kind = type(side.max_seqlen).__name__
        raise TypeError(f"max_seqlen{side.suffix} must be an int, got {kind}")
    if side.max_seqlen < 0:
        raise ValueError(f"max_seqlen{side.suffix} must not be negative, got {side.max_seqlen}")


def reads_values(cu_seqlens: Tensor) -> bool:
    """Whether the values of `cu_seqlens` may be looked at here and now.

    Not while a graph is traced or captured, nor of a tensor that has no values.
    """
    if torch.compiler.is_compiling() or type(cu_seqlens) is not Tensor:
        return False
    if cu_seqlens.is_cpu:
        return True
    if not cu_seqlens.is_cuda or os.environ.get("MASKED_VIT_KERNELS_CHECK") != "1":
        return False
    return not torch.cuda.is_current_stream_capturing()


def check_sequences(side: Side) -> None:
    """Raise ValueError unless the sequences lie in the rows, keep to `max_seqlen` and are those of
    the packing. Reads the values of `cu_seqlens`."""
    suffix = side.suffix
    bounds = tuple(side.cu_seqlens.tolist())
    longest = check_bounds(f"cu_seqlens{suffix}", bounds, side.rows)
    if longest > side.max_seqlen:
        raise ValueError(
            f"max_seqlen{suffix} must be at least the longest sequence, {longest}, got "
            f"{side.max_seqlen}"
        )
    packing = side.packing
    if packing is None or packing.cu_seqlens is side.cu_seqlens:
        return
    packed = tuple(packing.cu_seqlens.tolist())
    if packed != bounds:
        raise ValueError(
            f"packing{suffix} describes other sequences than cu_seqlens{suffix}: "
            f"{_shown(packed)} there and {_shown(bounds)} here"
        )


def check_bounds(name: str, bounds: tuple[int, ...], rows: int) -> int:
    """The longest length. Raise ValueError unless the sequences lie in order within the rows."""
    ordered, longest = _summary(bounds)
    if not ordered or bounds[-1] > rows:
        raise ValueError(
            f"{name} must start at 0, not decrease and end within the {rows} rows, got "
            f"{_shown(bounds)}"
        )
    return longest


@functools.lru_cache(maxsize=64)  # every layer of a step asks for the same
def _summary(bounds: tuple[int, ...]) -> tuple[bool, int]:
    """Whether the bounds start at 0 and do not decrease, and the longest length."""
    lengths = [last - first for first, last in itertools.pairwise(bounds)]
    ordered = bounds[:1] == (0,) and all(length >= 0 for length in lengths)
    return ordered, max(lengths, default=0)


def _shown(bounds: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, bounds[:8]))
    return f"[{shown}{', ...' if len(bounds) > 8 else ''}]"
