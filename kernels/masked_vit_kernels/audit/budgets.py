"""What a compiled kernel may cost, one entry a family of kernels, and whether it keeps to it."""

from __future__ import annotations

from dataclasses import dataclass

from masked_vit_kernels.audit.machine_code import MATRIX_INSTRUCTION, Measurement
from masked_vit_kernels.launch import SHARED_MEMORY_LIMIT


@dataclass(frozen=True)
class Budget:
    """Limits of one compiled kernel; None means that the figure is reported and not limited.

    Attributes:
        registers: per thread.
        stack_bytes: per thread, which is where spills go.
        local_in_loops: local loads and stores inside innermost loops.
        narrow_accesses: global loads and stores of fewer than 4 bytes.
        wide_loads: require loads of 16 bytes.
        tensor_cores: require the matrix instruction of the architecture.
    """

    registers: int | None = 255
    stack_bytes: int | None = 0
    local_in_loops: int | None = 0
    narrow_accesses: int | None = 0
    wide_loads: bool = True
    tensor_cores: bool = False


BUDGETS: dict[str, Budget] = {
    # One pass over memory, no matrix products: gathers, tokens, losses, optimiser, EMA.
    "streaming": Budget(registers=128),
    # The same, with a masked branch for the ends of tensors whose accesses may be narrow.
    "streaming_with_tails": Budget(registers=128, narrow_accesses=None),
    # Pixels: rows of a patch are as wide as the patch, so the widest access may be under 16 bytes.
    "pixels": Budget(registers=128, wide_loads=False),
    # Pixels whose rows start at even bytes only (14 uint8 pixels): 2-byte loads are the widest.
    "narrow_pixels": Budget(registers=128, wide_loads=False, narrow_accesses=16),
    # sm_100's compiler peels an iteration off the loop: the same 16 loads, twice.
    "narrow_pixels_matmul": Budget(narrow_accesses=32, tensor_cores=True),
    # Matrix products in half precision that must stay on chip.
    "matmul": Budget(tensor_cores=True),
    # Two-phase attention backward: at most 64 bytes of stack, none of it touched in a loop.
    "matmul_two_phase": Budget(stack_bytes=64, tensor_cores=True),
    # Reported, not limited (fp32 attention, small bookkeeping kernels).
    "reported": Budget(
        registers=None,
        stack_bytes=None,
        local_in_loops=None,
        narrow_accesses=None,
        wide_loads=False,
    ),
}


def violations(name: str, found: Measurement, capability: int) -> list[str]:
    """What in `found` breaks the budget of that name, in words; empty when it holds."""
    budget = BUDGETS[name]
    limits = {
        "registers": budget.registers,
        "stack_bytes": budget.stack_bytes,
        "local_in_loops": budget.local_in_loops,
        "narrow_accesses": budget.narrow_accesses,
        "shared_bytes": SHARED_MEMORY_LIMIT[capability],
        "tensor_memory_columns": 512,
    }
    if found.foreign_descriptors:
        wrong = f"{found.foreign_descriptors} products whose descriptors are no constants"
        return [f"miscompiled: {wrong} (see audit/descriptors.py): take other tiles"]
    broken = [
        f"{name} {getattr(found, name)} > {limit}"
        for name, limit in limits.items()
        if limit is not None and getattr(found, name) > limit
    ]
    if budget.wide_loads and not found.wide_loads:
        broken.append("no 16-byte loads")
    if budget.tensor_cores and not found.matrix_instructions:
        broken.append(f"no {MATRIX_INSTRUCTION[capability]} instruction")
    return broken
