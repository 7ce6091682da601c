"""The compile audit: what every kernel costs on each architecture, without a GPU."""

from masked_vit_kernels.audit.budgets import BUDGETS, violations
from masked_vit_kernels.audit.descriptors import foreign_descriptors
from masked_vit_kernels.audit.instructions import (
    Instruction,
    innermost_loops,
    parse_instructions,
)
from masked_vit_kernels.audit.machine_code import (
    Measurement,
    disassemble,
    measure,
    resource_usage,
)
from masked_vit_kernels.catalogue import AuditCase
from masked_vit_kernels.catalogue import audit_cases as all_cases
from masked_vit_kernels.compile import compile_launch

__all__ = [
    "BUDGETS",
    "AuditCase",
    "Instruction",
    "Measurement",
    "all_cases",
    "compile_launch",
    "disassemble",
    "foreign_descriptors",
    "innermost_loops",
    "measure",
    "parse_instructions",
    "resource_usage",
    "violations",
]
