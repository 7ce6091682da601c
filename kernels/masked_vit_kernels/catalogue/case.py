"""One entry of the C library's tables, and the numbers that C and Python call dtypes by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from masked_vit_kernels.launch import KernelLaunch

# `mvk_dtype` of masked_vit_kernels.h; the generated manifest asserts that they agree.
DTYPE_CODES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.uint8: 3,
    torch.int32: 4,
    torch.int64: 5,
}

# Keys that are upper bounds: of an op's cases, the first whose bounds hold is meant.
BOUNDS = ("max_seqlen_q", "max_seqlen_k", "max_programs")


@dataclass(frozen=True)
class Case:
    """One row of a launch table: by what it is found, and what is then launched.

    Attributes:
        op: the C function's name without `mvk_`.
        keys: what the C function looks for; the same names in the same order for all of an op.
        launches: kernels, in order.
        budget: key of `audit_budgets.BUDGETS` that every launch must hold.
        fixed: run-time arguments whose values belong to the table rather than to the call.
    """

    op: str
    keys: dict[str, int]
    launches: tuple[KernelLaunch, ...]
    budget: str
    fixed: tuple[str, ...] = ()


def code_of(dtype: torch.dtype) -> int:
    """The number of a dtype in the C API."""
    return DTYPE_CODES[dtype]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory: launch functions read shapes, strides and dtypes alone."""
    return torch.empty(shape, dtype=dtype, device="meta")
