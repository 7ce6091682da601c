"""The tensors in a dataclass of tensors: which they are, all but their values, and their memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from torch import Tensor

_UNSEEN_BY_THE_STEP = ("redraws", "fallbacks")  # counters for the log
_ALIGNMENT = 16  # bytes: the kernels' widest loads


def tensors_of(value: object) -> list[Tensor]:
    """Every tensor in a dataclass of tensors, dataclasses and plain values, in a fixed order."""
    if isinstance(value, Tensor):
        return [value]
    if not dataclasses.is_dataclass(value):
        return []
    fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return [tensor for field in fields for tensor in tensors_of(field)]


def layout_of(value: object) -> tuple:
    """All of such a dataclass but the tensors' values, hashable."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.device)
    if not dataclasses.is_dataclass(value):
        return (value,)
    names = [field.name for field in dataclasses.fields(value)]
    return tuple(layout_of(getattr(value, n)) for n in names if n not in _UNSEEN_BY_THE_STEP)


def padded_bytes(tensor: Tensor) -> int:
    """What a tensor takes of a block of bytes in which each begins aligned."""
    return -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT


def views_of(tensors: Iterable[Tensor], block: Tensor) -> Iterator[Tensor]:
    """Views of consecutive pieces of a block of bytes, each of the shape and dtype of a tensor."""
    start = 0
    for tensor in tensors:
        end = start + tensor.numel() * tensor.element_size()
        yield block[start:end].view(tensor.dtype).view(tensor.shape)
        start += padded_bytes(tensor)
