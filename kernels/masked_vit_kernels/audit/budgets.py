"""What a compiled kernel may cost. One entry a family of kernels, checked by the audit."""

from __future__ import annotations

from dataclasses import dataclass


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
