"""What a compiled kernel costs, read off its machine code with nvdisasm and cuobjdump."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.compiler import CompiledKernel

from masked_vit_kernels.audit.descriptors import foreign_descriptors
from masked_vit_kernels.audit.instructions import innermost_loops, parse_instructions

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# The matrix instruction each architecture should use, as nvdisasm spells it.
MATRIX_INSTRUCTION = {80: r"HMMA", 90: r"HGMMA", 100: r"UTC\w*MMA"}


@dataclass(frozen=True)
class Measurement:
    """What one compiled kernel costs, read off its machine code.

    `foreign_descriptors` counts products that read the wrong shared memory, see `descriptors.py`.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    local_accesses: int
    local_in_loops: int
    narrow_accesses: int
    wide_loads: int
    matrix_instructions: int
    other_matrix_instructions: int
    foreign_descriptors: int
    exponentials: int
    instructions: int


def disassemble(cubin: bytes, *flags: str) -> str:
    """The machine code of a cubin as nvdisasm prints it; flags: "-hex" adds the encodings."""
    return _run_tool("nvdisasm", "-c", *flags, cubin=cubin)


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack a thread."""
    usage = _run_tool("cuobjdump", "--dump-resource-usage", cubin=cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no registers and stack, but: {usage}")
    return int(found[1]), int(found[2])


def measure(compiled: CompiledKernel, capability: int) -> Measurement:
    """Registers, stack and instruction counts of a compiled kernel."""
    shared, tensor_memory = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", 0)
    return _measure(compiled.asm["cubin"], shared, tensor_memory, capability)


@functools.cache
def _measure(cubin: bytes, shared: int, tensor_memory: int, capability: int) -> Measurement:
    registers, stack_bytes = resource_usage(cubin)
    sass = disassemble(cubin)
    code = parse_instructions(sass)
    opcodes = [opcode for _, opcode, _ in code]
    loops = innermost_loops(code)
    local = [address for address, opcode, _ in code if opcode.startswith(("LDL", "STL"))]
    return Measurement(
        registers=registers,
        stack_bytes=stack_bytes,
        shared_bytes=shared,
        tensor_memory_columns=tensor_memory,
        local_accesses=len(local),
        local_in_loops=sum(any(a <= x <= b for a, b in loops) for x in local),
        narrow_accesses=_count(opcodes, r"(LDG|STG)\b.*\.[US](8|16)\b"),
        wide_loads=_count(opcodes, r"(LDG|LDGSTS)\b.*\.128\b|UBLKCP|UTMALDG"),
        matrix_instructions=_count(opcodes, MATRIX_INSTRUCTION[capability]),
        other_matrix_instructions=_count(opcodes, r"HMMA|HGMMA|UTC\w*MMA")
        - _count(opcodes, MATRIX_INSTRUCTION[capability]),
        foreign_descriptors=len(foreign_descriptors(sass)),
        exponentials=_count(opcodes, r"MUFU\.EX2"),
        instructions=len(code),
    )


def _count(opcodes: list[str], pattern: str) -> int:
    compiled = re.compile(pattern)
    return sum(bool(compiled.match(opcode)) for opcode in opcodes)


def _run_tool(name: str, *flags: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / name), *flags, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
