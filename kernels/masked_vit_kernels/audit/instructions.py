"""nvdisasm's text as instructions, and the loops in them."""

from __future__ import annotations

import re

Instruction = tuple[int, str, str]  # address, opcode with modifiers, operands


def parse_instructions(sass: str) -> list[Instruction]:
    """nvdisasm's text -> [(address, opcode, operands)], labels resolved in branch operands."""
    labels: dict[str, int] = {}
    pending: list[str] = []
    code: list[Instruction] = []
    pattern = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            pending.append(label.group(1))
        elif found := pattern.search(line):
            address = int(found.group(1), 16)
            labels.update(dict.fromkeys(pending, address))
            pending.clear()
            code.append((address, found.group(2), found.group(3)))
    return [
        (a, op, re.sub(r"`\((\.L_\w+)\)", lambda m: hex(labels.get(m.group(1), -1)), operands))
        for a, op, operands in code
    ]


def innermost_loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """Address ranges of loops (backward branches) that contain no other loop.

    The endless branch to itself that ends every kernel is no loop.
    """
    loops = []
    for address, opcode, operands in code:
        target = re.search(r"0x([0-9a-f]+)\s*$", operands)
        if opcode.startswith("BRA") and target and int(target.group(1), 16) < address:
            loops.append((int(target.group(1), 16), address))
    return [
        (a, b)
        for a, b in loops
        if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)
    ]
