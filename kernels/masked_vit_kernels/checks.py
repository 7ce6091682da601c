"""Argument checks that more than one op needs: each raises a ValueError that names the value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_tensor(name: str, x: object) -> None:
    """Raise TypeError unless `x` is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")


def check_shape(name: str, x: Tensor, shape: Sequence[int | None], pattern: str) -> None:
    """Raise ValueError unless the tensor `x` has `shape`; None matches any size.

    Args:
        pattern: what the text says of the shape.

    Raises:
        TypeError: no tensor.
    """
    check_tensor(name, x)
    fits = x.ndim == len(shape) and all(
        want is None or have == want for have, want in zip(x.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} must have shape {pattern}, got {tuple(x.shape)}")


def check_dtype(name: str, x: Tensor, allowed: Sequence[torch.dtype] = TRITON_DTYPES) -> None:
    """Raise ValueError unless `x` has one of the `allowed` dtypes."""
    if x.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(f"{name} must be one of {names}, got {x.dtype}")


def check_same_device(first_name: str, first: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless every given tensor lies on the device of the first.

    Raises:
        TypeError: something is no tensor.
    """
    check_tensor(first_name, first)
    for name, other in others.items():
        if other is not None:
            check_tensor(name, other)
        if other is not None and other.device != first.device:
            raise ValueError(
                f"{name} must be on {first.device} like {first_name}, got {other.device}"
            )


def check_index_dtype(name: str, indices: Tensor) -> None:
    """Raise ValueError unless `indices` are int32 or int64."""
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {indices.dtype}")
