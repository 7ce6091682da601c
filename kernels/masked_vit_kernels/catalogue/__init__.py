"""Every launch there is, once: the C library holds them, the audit compiles them.

Every launch is built from `meta` tensors by the op's own launch function, so that constexprs,
options and divisibility hints are those of the real launch. Nothing here says what a tile is or how
many warps run it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from masked_vit_kernels.catalogue.attention import attention_cases
from masked_vit_kernels.catalogue.case import AuditCase, Case
from masked_vit_kernels.catalogue.optimizer import optimizer_cases
from masked_vit_kernels.catalogue.tokens import token_cases


@functools.cache
def all_cases(capability: int) -> tuple[Case, ...]:
    """Every case for one capability (80, 90 or 100)."""
    return (*attention_cases(capability), *token_cases(capability), *optimizer_cases(capability))


def library_cases(capability: int) -> Iterator[Case]:
    """Those that the C library holds."""
    return (case for case in all_cases(capability) if case.in_library)


def audit_cases(capability: int) -> Iterator[AuditCase]:
    """The launches of every case, one by one."""
    for case in all_cases(capability):
        yield from case.audit_cases()
