"""What a program that has work runs of its kernel's machine code, and where it waits for loads.

Branches are followed statically: an instruction counts as run where a path leads from it to a
matrix product or from a product to it. That leaves out the programs that only clear padding rows:
an early branch, a few loops of stores and EXIT. Two sides of a branch that both lead to products
count both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from masked_vit_kernels import audit
from masked_vit_kernels.audit import Instruction

PRODUCT = re.compile(r"HGMMA|HMMA")
_NOT_FOLLOWED = re.compile(r"(BRX|JMX|JMP|CALL|RET|UBLKCP|UTMA\w*)\b")
_WIDTH = {"128": 4, "64": 2, "WIDE": 2}  # registers that are written, by modifier of the opcode

Loop = tuple[int, int]  # addresses of the first and the last instruction


@dataclass(frozen=True)
class WorkingCode:
    """The instructions, in order of address, of programs that come to a matrix product.

    `loops` are those with products in them.
    """

    instructions: list[Instruction]
    loops: list[Loop]

    def depth_of(self, address: int) -> int:
        """In how many of the loops an instruction stands."""
        return sum(first <= address <= last for first, last in self.loops)


def working_code(sass: str, within: Loop | None = None) -> WorkingCode:
    """What programs with work run, of machine code as nvdisasm prints it.

    within: a loop: of programs that come to the products in it, where a kernel has code of its own
        for several lengths.

    Raises:
        ValueError: no product, or control flow or copies of a kind that is not followed here.
    """
    code = audit.parse_instructions(sass)
    for address, opcode, _ in code:
        if _NOT_FOLLOWED.match(opcode):
            raise ValueError(
                f"{opcode} at {address:#x}: branches by BRA and copies by LDG and LDGSTS are"
                " followed, nothing else; teach bench/ops/machine_flow.py this instruction"
            )
    products = [
        address for address, opcode, _ in code
        if PRODUCT.match(opcode) and (within is None or within[0] <= address <= within[1])
    ]  # fmt: skip
    if not products:
        raise ValueError("no matrix product (HGMMA, HMMA) in this machine code")
    after = _successors(code, sass)
    before: dict[int, list[int]] = {address: [] for address in after}
    for address, following in after.items():
        for target in following:
            before[target].append(address)
    kept = _reached(products, after) | _reached(products, before)
    loops = [
        (target, address)
        for address in sorted(kept)
        for target in after[address]
        if target < address
        and any(target <= product <= address for product in products)
        # code that was moved out of line branches back too, but is not reached from there
        and address in _reached([target], after, within=(target, address))
    ]
    return WorkingCode([instruction for instruction in code if instruction[0] in kept], loops)


def exposed_waits(
    code: WorkingCode,
    cycles_of: Callable[[str], float],
    latency: float,
    cached_latency: float,
) -> dict[int, float]:
    """Cycles a program stands still for loads, by depth of loops, each loop's body run once.

    The code is walked with a clock that `cycles_of(opcode)` advances. A load (LDG) is there
    `latency` cycles after its issue, after `cached_latency` where a load before it brought the same
    128 bytes, and is waited for by the first instruction that names a register it writes.
    Asynchronous copies (LDGSTS, grouped by LDGDEPBAR) are waited for by DEPBAR.LE SB0, N, which
    lets the N youngest groups fly on. What a loop loads for its next iteration is waited for there:
    of every loop three iterations are walked and the mean of the later two is counted.
    """
    exposed = dict.fromkeys(map(code.depth_of, (i[0] for i in code.instructions)), 0.0)
    clock, copied = 0.0, 0.0
    registers: dict[int, float] = {}  # when what a register is loaded with arrives
    lines: dict[tuple[int, int], float] = {}  # when 128 bytes arrive: address register, offset
    groups: list[float] = []  # when each group of copies arrives
    for (address, opcode, operands), weight in _walk(code.instructions, code.loops):
        named = [int(number) for number in re.findall(r"\bR(\d+)", operands)]
        ready = max((registers.pop(register, 0.0) for register in named), default=0.0)
        if opcode.startswith("DEPBAR"):
            awaited = max(len(groups) - _left_flying(opcode, operands), 0)
            ready = max([ready, *groups[:awaited]])
            del groups[:awaited]
        exposed[code.depth_of(address)] += weight * max(ready - clock, 0.0)
        clock = max(clock, ready) + cycles_of(opcode)
        arrival = clock + latency
        if line := _line(opcode, operands):
            if line in lines:
                arrival = max(lines[line], clock + cached_latency)
            lines[line] = arrival
        if opcode.startswith("LDGSTS"):
            copied = clock + latency
        elif opcode.startswith("LDGDEPBAR"):
            groups.append(copied)
        written = _written(opcode, operands)
        if opcode.startswith("LDG"):
            registers.update(dict.fromkeys(written, arrival))
        for line in [line for line in lines if line[0] in written or line[0] + 1 in written]:
            del lines[line]
    return exposed


def _line(opcode: str, operands: str) -> tuple[int, int] | None:
    """The 128 bytes that an LDG reads, as far as the code tells: address register and offset."""
    found = re.search(r"\[R(\d+)\.64(?:\+(-?0x[0-9a-f]+))?\]", operands)
    if not found or not re.match(r"LDG\b", opcode):
        return None
    return int(found.group(1)), int(found.group(2) or "0", 16) // 128


def _written(opcode: str, operands: str) -> range:
    """The registers that an instruction writes."""
    first = re.match(r"R(\d+)", operands)
    if not first or opcode.startswith(("ST", "LDGSTS", "RED")):
        return range(0)
    width = next((_WIDTH[part] for part in opcode.split(".") if part in _WIDTH), 1)
    return range(int(first.group(1)), int(first.group(1)) + width)


def _left_flying(opcode: str, operands: str) -> int:
    """How many of the youngest groups a DEPBAR does not wait for."""
    found = re.fullmatch(r"SB0,\s*(0x[0-9a-f]+)\s*", operands)
    if not opcode.startswith("DEPBAR.LE") or not found:
        raise ValueError(f"expected DEPBAR.LE SB0, N, got {opcode} {operands}")
    return int(found.group(1), 16)


def _walk(
    code: list[Instruction], loops: list[Loop], weight: float = 1.0
) -> Iterator[tuple[Instruction, float]]:
    """Every instruction in order, loops three times, with what that time counts."""
    end = -1
    for instruction in code:
        address = instruction[0]
        if address <= end:
            continue  # of a loop that was walked
        last = max((b for a, b in loops if a == address), default=None)
        if last is None:
            yield instruction, weight
            continue
        body = [other for other in code if address <= other[0] <= last]
        within = [(a, b) for a, b in loops if address <= a and b <= last]
        inner = [loop for loop in within if loop != (address, last)]
        for counts in (0.0, 0.5, 0.5):
            yield from _walk(body, inner, weight * counts)
        end = last


def _successors(code: list[Instruction], sass: str) -> dict[int, list[int]]:
    """Addresses that may run after each."""
    guarded = {int(address, 16) for address in re.findall(r"/\*([0-9a-f]{4,})\*/\s+@", sass)}
    following = {a: b for (a, _, _), (b, _, _) in pairwise(code)}
    after: dict[int, list[int]] = {}
    for address, opcode, operands in code:
        after[address] = []
        # a condition stands before the instruction or, of a uniform branch, among its operands
        always_leaves = opcode.startswith(("BRA", "EXIT")) and not (
            address in guarded or "," in operands
        )
        if address in following and not always_leaves:
            after[address].append(following[address])
        if opcode.startswith("BRA"):
            target = _target(operands)
            if target is None:
                raise ValueError(f"a branch without a target at {address:#x}: {opcode} {operands}")
            after[address].append(target)
    return after


def _target(operands: str) -> int | None:
    found = re.search(r"0x([0-9a-f]+)\s*$", operands)
    return int(found.group(1), 16) if found else None


def _reached(start: list[int], edges: dict[int, list[int]], within: Loop | None = None) -> set[int]:
    """`start` and whatever can be reached from it, without leaving the addresses `within`."""
    first, last = within or (min(edges), max(edges))
    found, open_ends = set(start), list(start)
    while open_ends:
        for address in edges[open_ends.pop()]:
            if address not in found and first <= address <= last:
                found.add(address)
                open_ends.append(address)
    return found
