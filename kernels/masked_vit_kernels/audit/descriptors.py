"""Whether the matrix products of sm_90 read the shared memory that they should.

A wgmma product finds its operands by descriptors in uniform registers: an address in shared memory,
which is a constant of the kernel or, with eight warps, of the warp. Where a program needs more
descriptors than there are uniform registers, Triton 3.6's ptxas shares registers among them, and
sometimes forgets to write one before it is read: the descriptor is then computed from whatever the
register held, a pointer into global memory or a thread's number, and the product reads a wrong tile
or faults.

On an H200 that was attention's dq of D=80 and 88 in unpipelined programs. Of 56 kernels there,
9 wrong or faulting and 47 right, this finds the 9 and no other.
"""

from __future__ import annotations

import re

from masked_vit_kernels.audit.instructions import Instruction, parse_instructions

_REGISTER = re.compile(r"(?<![\w.])(U?R)(\d+)\b")
_WIDE = re.compile(r"\.(64|WIDE)\b")
# What differs between launches, programs or threads: kernel arguments and ids.
_VARIES = re.compile(r"c\[0x0\]\[0x[2-9a-f]|SR_CTAID|SR_NCTAID|SR_TID")
_READS_DATA = re.compile(r"LDG|LDS|LDC|ULDC|LD\b|ATOM|HGMMA|HMMA|MUFU")
_NO_RESULT = re.compile(
    r"ST[GS]|BAR|BRA|EXIT|LDGSTS|RED\b|LDGDEPBAR|DEPBAR|WARP|MEMBAR|FENCE|BSSY|BSYNC|NOP|U?ISETP"
    r"|FSETP|PLOP3|BREAK|YIELD"
)
_STACK = re.compile(r"\[R1(?:\+(0x[0-9a-f]+))?\]")

Names = frozenset[str]  # registers, and words of the stack: "R8", "UR20", "stack24"


def foreign_descriptors(sass: str) -> list[int]:
    """Addresses of wgmma instructions with a descriptor that is no constant of the kernel.

    Args:
        sass: machine code as nvdisasm prints it.
    """
    code = parse_instructions(sass)
    guarded = {int(a, 16) for a in re.findall(r"/\*([0-9a-f]{4,})\*/\s+@", sass)}
    following = _following(code, guarded)
    by_address = {instruction[0]: instruction for instruction in code}
    constant: dict[int, Names] = {}  # what is constant, along every path, where each begins
    pending: list[tuple[int, Names]] = [(code[0][0], frozenset())] if code else []
    while pending:
        address, arriving = pending.pop()
        known = constant.get(address)
        if known is not None and known <= arriving:
            continue
        constant[address] = state = arriving if known is None else arriving & known
        leaving = _after(by_address[address], state, address in guarded)
        pending += [(target, leaving) for target in following[address] if target in by_address]
    return [
        address
        for address, opcode, operands in code
        if opcode.startswith("HGMMA")
        and address in constant
        and not _descriptor_registers(operands) <= constant[address]
    ]


def _after(instruction: Instruction, constant: Names, conditional: bool) -> Names:
    """What is constant after an instruction, of what was before it."""
    _, opcode, operands = instruction
    if _NO_RESULT.match(opcode):
        return constant
    if opcode.startswith("STL"):
        slots, (source,) = _slots(opcode, operands), _REGISTER.findall(operands)[-1:]
        words = _run("".join(source[:1]), int(source[1]), len(slots))
        kept = {slot for slot, word in zip(slots, words, strict=True) if word in constant}
        return constant - set(slots) | kept
    target, _, sources = operands.partition(",")
    found = _REGISTER.search(target)
    if found is None:
        return constant
    written = _run(found.group(1), int(found.group(2)), _width(opcode))
    if opcode.startswith("LDL"):
        slots = _slots(opcode, operands)
        kept = {word for slot, word in zip(slots, written, strict=True) if slot in constant}
        return constant - set(written) | kept
    of_a_warp = _number_of_warp(opcode, sources, constant)
    constant -= {_thread(register) for register in written}
    if "SR_TID.X" in sources:
        return constant - set(written) | {_thread(written[0])}
    if opcode.startswith("SHFL") or of_a_warp:
        return constant if conditional else constant | set(written)
    varies = _READS_DATA.match(opcode) or _VARIES.search(sources)
    if varies or not set(_read(sources, opcode)) <= constant:
        return constant - set(written)
    return constant if conditional else constant | set(written)


def _thread(register: str) -> str:
    """The name of the fact that a register holds the thread's number."""
    return f"thread {register}"


def _number_of_warp(opcode: str, sources: str, known: Names) -> bool:
    """Whether bits of a thread's number are taken that all threads of a warp share."""
    names = _REGISTER.findall(sources)
    if len(names) != 1 or _thread("".join(names[0])) not in known:
        return False
    if opcode.startswith("SHF.R.U32"):
        shift = re.search(r"RZ, (0x[0-9a-f]+)", sources)
        return shift is not None and int(shift.group(1), 16) >= 5
    mask = re.search(r"R\d+(?:\.reuse)?, (0x[0-9a-f]+), RZ, 0xc0", sources)
    return opcode.startswith("LOP3") and mask is not None and int(mask.group(1), 16) % 32 == 0


def _run(kind: str, first: int, count: int) -> list[str]:
    return [f"{kind}{first + i}" for i in range(count)]


def _slots(opcode: str, operands: str) -> list[str]:
    """The words of the stack that a local load or store touches."""
    found = _STACK.search(operands)
    first = int(found.group(1) or "0", 16) if found else -1
    return [f"stack{first + 4 * i}" for i in range(_width(opcode))]


def _width(opcode: str) -> int:
    """Registers that an instruction writes."""
    if ".128" in opcode:
        return 4
    if product := re.match(r"HGMMA\.64x(\d+)", opcode):
        return int(product.group(1)) // 2
    return 2 if _WIDE.search(opcode) or opcode.startswith("CS2R") else 1


def _read(operands: str, opcode: str) -> list[str]:
    """Registers read; in pairs where the instruction works on 64 bits."""
    pairs = ".64" in opcode
    return [
        name
        for kind, number in _REGISTER.findall(operands)
        for name in _run(kind, int(number), 2 if pairs else 1)
    ]


def _descriptor_registers(operands: str) -> Names:
    """Of a wgmma: two descriptors from gdesc[URn] on, the second alone if A is in registers."""
    found = re.search(r"(,\s*R\d+)?,\s*gdesc\[UR(\d+)\]", operands)
    if found is None:
        raise ValueError(f"a wgmma without a descriptor: {operands}")
    return frozenset(_run("UR", int(found.group(2)), 4)[2 if found.group(1) else 0 :])


def _following(code: list[Instruction], guarded: set[int]) -> dict[int, list[int]]:
    """Addresses that may run after each."""
    after: dict[int, list[int]] = {}
    for position, (address, opcode, operands) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)\s*$", operands)
        leaves = opcode.startswith(("BRA", "EXIT")) and address not in guarded
        leaves = leaves and "," not in operands  # a uniform branch has its condition there
        after[address] = [] if leaves or position + 1 == len(code) else [code[position + 1][0]]
        if opcode.startswith("BRA") and target:
            after[address].append(int(target.group(1), 16))
    return after
