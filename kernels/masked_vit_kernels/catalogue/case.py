"""One entry of the catalogue: what is launched for which sizes, and what that may cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from masked_vit_kernels.launch import KernelLaunch

Key = int | str | torch.dtype | None
Keys = dict[str, Key]

UNBOUNDED = 2**31 - 1  # as a longest sequence


@dataclass(frozen=True)
class Case:
    """One row of a launch table: by what it is found, and what is then launched.

    Attributes:
        op: the C function's name without `mvk_`.
        keys: what the C function looks for; the same names in the same order for all of an op that
            are in the library.
        launches: kernels, in order.
        budgets: for each launch the key of `audit.budgets.BUDGETS` that it must hold.
        fixed: run-time arguments whose values belong to the table rather than to the call.
        core: belongs to the short audit that runs with the tests.
        in_library: the C library holds it; if not, only the audit compiles it.
    """

    op: str
    keys: Keys
    launches: tuple[KernelLaunch, ...]
    budgets: tuple[str, ...]
    fixed: tuple[str, ...] = ()
    core: bool = False
    in_library: bool = True

    def audit_cases(self) -> Iterator[AuditCase]:
        """Its launches one by one, under names that tell them apart."""
        sizes = " ".join(f"{name}={_text(value)}" for name, value in self.keys.items())
        for launch, budget in zip(self.launches, self.budgets, strict=True):
            of = launch.arguments
            kind = f" {of['KIND']} {of['BLOCK_Q']}x{of['BLOCK_K']}" if "KIND" in of else ""
            yield AuditCase(f"{self.op}{kind} {sizes}", launch, budget, self.core)


@dataclass(frozen=True)
class AuditCase:
    """One launch as the audit compiles and judges it.

    Attributes:
        name: op, kind and sizes, for instance "gather_rows dtype=bfloat16 width=768 layout=dense".
        launch: built from `meta` tensors by the op's own launch function.
        budget: key of `audit.budgets.BUDGETS`.
        core: belongs to the short audit that runs with the tests.
    """

    name: str
    launch: KernelLaunch
    budget: str
    core: bool = True


def _text(value: Key) -> str:
    return "any" if value == UNBOUNDED else str(value).removeprefix("torch.")


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory: launch functions read shapes, strides and dtypes alone."""
    return torch.empty(shape, dtype=dtype, device="meta")
