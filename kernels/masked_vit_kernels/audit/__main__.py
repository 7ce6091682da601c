"""Compile every kernel for sm_80, sm_90 and sm_100 without a GPU and hold it to its budget.

    python -m masked_vit_kernels.audit [--capability 90] [--match TEXT] [--core]

What it compiles are the launches of the catalogue, built from `meta` tensors by the very functions
that build the real ones. They are compiled as Triton's launcher would (`compile.py`), with Triton's
own ptxas; registers, stack and instructions are read off the machine code, once a kernel: several
cases may share one.
"""

from __future__ import annotations

import argparse
import os
import sys

from masked_vit_kernels.audit.budgets import violations
from masked_vit_kernels.audit.machine_code import measure
from masked_vit_kernels.catalogue import audit_cases
from masked_vit_kernels.compile import compile_launch
from masked_vit_kernels.launch import CAPABILITIES


def main(arguments: list[str] | None = None) -> int:
    """Compile, print one line a kernel, return 1 where a budget is broken."""
    parser = argparse.ArgumentParser(description="compile every kernel and hold it to its budget")
    parser.add_argument("--capability", type=int, choices=CAPABILITIES, action="append")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--core", action="store_true", help="only the cases the tests compile")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: the interpreter compiles nothing")

    print(f"{'sm':>3} {'reg':>3} {'stack':>5} {'shared':>6} {'mma':>4} {'warps':>5} kernel")
    failures = 0
    for capability in options.capability or CAPABILITIES:
        for case in audit_cases(capability):
            if options.match not in case.name or (options.core and not case.core):
                continue
            found = measure(compile_launch(case.launch, capability), capability)
            broken = violations(case.budget, found, capability)
            failures += bool(broken)
            over = f"  OVER: {'; '.join(broken)}" if broken else ""
            print(
                f"{capability:>3} {found.registers:>3} {found.stack_bytes:>5}"
                f" {found.shared_bytes:>6} {found.matrix_instructions:>4}"
                f" {case.launch.num_warps:>5} {case.name}{over}",
                flush=True,
            )
    print(f"{failures} over budget" if failures else "every budget holds")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
