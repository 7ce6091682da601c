"""How long programs take on a Hopper multiprocessor: their machine code, played on a model of it.

Every instruction carries what the compiler decided about its timing: cycles to stand still after
it, the scoreboard it signals, those it waits for. With latencies of what the scoreboards guard,
rates of the pipes and a queue for memory, the code of all the warps that share a scheduler can be
played in order. A multiprocessor is four equal schedulers: one is played, with a quarter of its
bandwidths.

What the H200 showed the counts alone to miss, and what is therefore here: minimum, select, compare,
conversion and integer instructions issue at half the rate of multiply-adds; few warps a scheduler
cannot hide each other's latencies; every program pays for its own loads of bounds, queries and
keys, one after the other, before its first product.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from masked_vit_kernels import audit
from masked_vit_kernels.audit import Instruction

from bench.ops.machine_flow import PRODUCT, Loop, WorkingCode, working_code

NONE = 7  # the scoreboard that is none


@dataclass(frozen=True)
class Machine:
    """Rates and latencies, in cycles of one multiprocessor's clock.

    Attributes:
        memory_latency: of a load whose bytes come from memory; `cache_latency`: from L2.
        bytes_per_cycle: of memory, a multiprocessor's share; `cached_bytes_per_cycle`: of L2.
        launch_gap: from a program's last instruction to the first of the next in its place.
        branch: of a taken branch.
    """

    clock: float = 1.7e9
    memory_latency: float = 800
    cache_latency: float = 300
    bytes_per_cycle: float = 4.2e12 / 132 / 1.7e9
    cached_bytes_per_cycle: float = 36
    launch_gap: float = 300
    branch: float = 8
    barrier: float = 20
    product_latency: float = 24
    exponential: float = 8  # a warp's, of a quarter of the 16 lanes
    exponential_latency: float = 20
    shared_latency: float = 26
    local_latency: float = 200


HOPPER = Machine()

_FULL_RATE = re.compile(
    r"FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2|NOP|BRA|EXIT|WARPGROUP|DEPBAR|LDGDEPBAR|U[A-Z]|R2UR|S2UR"
)


@dataclass(frozen=True)
class Step:
    """One instruction as the model plays it: where it issues, for how long, what it waits for."""

    pipe: str
    cycles: float
    stall: int
    write: int
    read: int
    wait: tuple[int, ...]
    latency: float = 0.0
    bytes: float = 0.0
    left_flying: int = -1
    commits: bool = False


def step_of(opcode: str, operands: str, control: int, machine: Machine) -> Step:
    """Decode one instruction; `control` is the upper half of its encoding."""
    bits = control >> 41
    step = Step(
        pipe="half", cycles=2, stall=bits & 15, write=bits >> 5 & 7, read=bits >> 8 & 7,
        wait=tuple(n for n in range(6) if bits >> 11 & 1 << n), latency=14,
    )  # fmt: skip
    wide = 4 if ".128" in opcode else 2 if ".64" in opcode else 1
    if opcode.startswith("HGMMA"):
        width = int(re.findall(r"64x(\d+)x16", opcode)[0])
        return replace(step, pipe="tensor", cycles=max(width / 2, 16),
                       latency=machine.product_latency, commits="gsb0" in operands)  # fmt: skip
    if opcode.startswith("HMMA"):
        return replace(step, pipe="tensor", cycles=6.4, latency=machine.product_latency)
    if opcode.startswith("WARPGROUP.DEPBAR"):
        return replace(step, pipe="product_wait", cycles=1,
                       left_flying=int(operands.split(",")[1], 16))  # fmt: skip
    if opcode.startswith("DEPBAR.LE"):
        return replace(step, pipe="copy_wait", cycles=1,
                       left_flying=int(operands.split(",")[1], 16))  # fmt: skip
    if opcode.startswith("LDGDEPBAR"):
        return replace(step, pipe="copy_commit", cycles=1)
    if opcode.startswith("MUFU"):
        return replace(step, pipe="exponential", cycles=machine.exponential,
                       latency=machine.exponential_latency)  # fmt: skip
    if opcode.startswith("LDGSTS"):
        return replace(step, pipe="copy", cycles=2 * wide, bytes=128 * wide)
    if opcode.startswith("LDG"):
        return replace(step, pipe="load", cycles=2 * wide, bytes=128 * wide)
    if opcode.startswith(("STG", "RED", "ATOM")):
        return replace(step, pipe="store", cycles=2 * wide, bytes=128 * wide)
    if opcode.startswith(("LDS", "STS", "LDSM", "STSM")):
        matrix = re.search(r"M88\.([24])", opcode)
        wide = int(matrix.group(1)) if matrix else wide
        return replace(step, pipe="shared", cycles=4 * wide, latency=machine.shared_latency)
    if opcode.startswith(("LDL", "STL")):
        return replace(step, pipe="local", cycles=2 * wide, bytes=128 * wide)
    if opcode.startswith("SHFL"):
        return replace(step, pipe="shared", cycles=4, latency=machine.shared_latency)
    if opcode.startswith("BAR"):
        return replace(step, pipe="barrier", cycles=1, latency=machine.barrier)
    if opcode.startswith(("LDC", "S2R", "S2UR", "ULDC", "R2UR", "CS2R")):
        return replace(step, pipe="full", cycles=1, latency=30)
    if opcode.startswith("BRA"):
        return replace(step, pipe="full", cycles=1, stall=max(step.stall, int(machine.branch)))
    if _FULL_RATE.match(opcode):
        return replace(step, pipe="full", cycles=1)
    return step


def controls(sass: str) -> dict[int, int]:
    """Address -> upper half of the encoding, of what `nvdisasm -hex` prints."""
    found: dict[int, int] = {}
    address = None
    for line in sass.splitlines():
        if start := re.match(r"\s*/\*([0-9a-f]{4,})\*/", line):
            address = int(start.group(1), 16)
        elif address is not None and (word := re.match(r"\s*/\* 0x([0-9a-f]{16}) \*/", line)):
            found[address] = int(word.group(1), 16)
            address = None
    return found


def trace(
    code: WorkingCode, steps: dict[int, Step], trips: Callable[[int, int], int]
) -> list[Step]:
    """The steps of one warp: loops unrolled, `trips(level, depth)` times each.

    What an innermost loop can skip without missing a product runs in its last round alone: the mask
    of a sequence's last keys.
    """
    skipped = _skipped(code)

    def walk(body: list[Instruction], within: Loop | None, level: int) -> list[Step]:
        played: list[Step] = []
        end = -1
        for address, _, _ in body:
            if address <= end:
                continue
            loop = max(
                (other for other in code.loops if other[0] == address and other != within
                 and (within is None or other[1] < within[1])),
                key=lambda other: other[1], default=None,
            )  # fmt: skip
            if loop is None:
                played.append(steps[address])
                continue
            end = loop[1]
            inside = [other for other in body if loop[0] <= other[0] <= loop[1]]
            inner = [other for other in code.loops if loop[0] <= other[0] and other[1] <= loop[1]]
            times = trips(level, max(code.depth_of(first) for first, _ in inner))
            if len(inner) == 1:
                always = [other for other in inside if other[0] not in skipped]
                played += walk(always, loop, level + 1) * (times - 1)
                played += walk(inside, loop, level + 1) * (times > 0)
            else:
                played += walk(inside, loop, level + 1) * times
        return played

    return walk(code.instructions, None, 0)


def _skipped(code: WorkingCode) -> set[int]:
    """Addresses that a branch forward within a loop leaves out, where no product is among them."""
    left_out: set[int] = set()
    for address, opcode, operands in code.instructions:
        target = re.search(r"0x([0-9a-f]+)\s*$", operands)
        if not opcode.startswith("BRA") or not target or not code.depth_of(address):
            continue
        between = [i for i in code.instructions if address < i[0] < int(target.group(1), 16)]
        same_loop = all(code.depth_of(i[0]) == code.depth_of(address) for i in between)
        if same_loop and not any(PRODUCT.match(opcode) for _, opcode, _ in between):
            left_out.update(i[0] for i in between)
    return left_out


@dataclass(frozen=True)
class Code:
    """A kernel's machine code with what its compiler wrote beside each instruction."""

    working: WorkingCode
    controls: dict[int, int]

    @classmethod
    def of(cls, cubin: bytes) -> Code:
        """Disassembled."""
        sass = audit.disassemble(cubin)
        return cls(working_code(sass), controls(audit.disassemble(cubin, "-hex")))

    def steps(self, machine: Machine) -> dict[int, Step]:
        """Of every address."""
        return {
            address: step_of(opcode, operands, self.controls[address], machine)
            for address, opcode, operands in self.working.instructions
        }


def microseconds(
    traces: list[list[Step]],
    *,
    programs: float,
    warps: int,
    resident: int,
    read_once: float,
    useful: float,
    machine: Machine = HOPPER,
) -> float:
    """What a multiprocessor takes for its share of a launch.

    Args:
        traces: of programs that stand for all.
        programs: the multiprocessor's share of them; fewer than two rounds run once, side by side.
        warps, resident: of a program; programs that run at once.
        read_once: bytes that a program would load if nothing were loaded twice.
        useful: the share of the lanes that load.
    """
    loads = [sum(s.bytes for s in steps if s.pipe in ("load", "copy")) for steps in traces]
    from_memory = min(1.0, read_once / (sum(loads) * warps * useful / len(traces)))
    if programs < 2 * resident:
        some = traces[: max(round(programs), 1)]
        cycles = play(some, warps // 4, min(resident, len(some)), from_memory, useful, machine)[-1]
    else:
        ends = play(traces, warps // 4, resident, from_memory, useful, machine)
        first, last = resident - 1, len(ends) - 1 - resident
        cycles = programs * (ends[last] - ends[first]) / (last - first)
    return 1e6 * cycles / machine.clock


class _Warp:
    __slots__ = (
        "arrived",
        "at",
        "boards",
        "copied",
        "groups",
        "pending",
        "products",
        "program",
        "ready",
        "steps",
    )  # fmt: skip

    def __init__(self, program: int, steps: list[Step], start: float):
        self.program, self.steps, self.at, self.ready = program, steps, 0, start
        self.boards = [0.0] * 8
        self.products: list[float] = []  # when each committed group of products is done
        self.pending = 0.0
        self.groups: list[float] = []
        self.copied = 0.0
        self.arrived = -1.0


def play(
    traces: list[list[Step]],
    warps: int,
    resident: int,
    from_memory: float,
    useful: float,
    machine: Machine = HOPPER,
) -> list[float]:
    """The cycle at which each program of a queue ends, in order.

    Args:
        traces: of each program in the queue, the same for all its warps.
        warps: of a program, on this scheduler.
        resident: programs that run at once.
        from_memory: the share of the loaded bytes that memory delivers; the rest comes from L2.
        useful: the share of the lanes that load.
    """
    share = machine.bytes_per_cycle / 4
    cached_share = machine.cached_bytes_per_cycle / 4
    free = dict.fromkeys(("full", "half", "tensor", "exponential", "shared", "memory_pipe"), 0.0)
    memory_free = cache_free = 0.0
    queue = list(enumerate(traces))[::-1]
    running: list[_Warp] = []
    left: dict[int, int] = {}
    waiting: dict[int, list[_Warp]] = {}
    finished: list[float] = []
    clock = 0.0

    def start(at: float) -> None:
        if queue:
            number, steps = queue.pop()
            left[number] = warps
            running.extend(_Warp(number, steps, at) for _ in range(warps))

    for number in range(resident):
        start(number * 40.0)
    pipe_of = {"load": "memory_pipe", "copy": "memory_pipe", "store": "memory_pipe",
               "local": "memory_pipe",
               "product_wait": "full", "copy_wait": "full", "copy_commit": "full",
               "barrier": "full"}  # fmt: skip
    while running:
        best, best_time = None, float("inf")
        for warp in running:
            if warp.ready >= best_time:
                continue
            step = warp.steps[warp.at]
            time = warp.ready
            for board in step.wait:
                if warp.boards[board] > time:
                    time = warp.boards[board]
            if step.left_flying >= 0:
                flying = warp.products if step.pipe == "product_wait" else warp.groups
                landed = len(flying) - step.left_flying
                if landed > 0:
                    time = max(time, *flying[:landed])
            pipe = free[pipe_of.get(step.pipe, step.pipe)]
            if pipe > time and step.pipe != "tensor":
                time = pipe
            if time < best_time:
                best, best_time = warp, time
        assert best is not None  # some warp runs, or the loop had ended
        warp, step = best, best.steps[best.at]
        now = max(clock, best_time)
        clock = now + 1
        warp.ready = now + max(step.stall, 1)
        done: float = now + step.latency
        kind = step.pipe
        if kind == "tensor":
            begin = max(now, free["tensor"])
            free["tensor"] = begin + step.cycles
            done = begin + step.cycles + step.latency
            warp.pending = done
            if step.commits:
                warp.products.append(done)
        elif kind == "product_wait":
            del warp.products[: max(len(warp.products) - step.left_flying, 0)]
        elif kind == "copy_wait":
            del warp.groups[: max(len(warp.groups) - step.left_flying, 0)]
        elif kind == "copy_commit":
            warp.groups.append(warp.copied)
        elif kind in ("load", "copy", "store"):
            free["memory_pipe"] = now + step.cycles
            moved = step.bytes * useful
            cache_free = max(cache_free, now) + moved / cached_share
            portion = 1.0 if kind == "store" else from_memory
            memory_free = max(memory_free, now) + moved * portion / share
            latency = machine.cache_latency + from_memory * (
                machine.memory_latency - machine.cache_latency
            )
            done = max(cache_free, memory_free, now) + latency
            if kind == "copy":
                warp.copied = max(warp.copied, done)
            if kind == "store":
                done = now + 20
        elif kind == "local":
            free["memory_pipe"] = now + step.cycles
            cache_free = max(cache_free, now) + step.bytes / cached_share
            done = cache_free + machine.local_latency
        elif kind == "barrier":
            others = waiting.setdefault(warp.program, [])
            others.append(warp)
            if len(others) == left[warp.program]:
                for other in others:
                    other.ready = max(now + step.latency, other.ready)
                    if other not in running:
                        running.append(other)
                waiting[warp.program] = []
            else:
                running.remove(warp)
        else:
            free[kind] = now + step.cycles
            done = now + step.cycles + step.latency
        if step.write != NONE:
            warp.boards[step.write] = max(warp.boards[step.write], done)
        if step.read != NONE:
            read = now + 20 if kind != "tensor" else done
            warp.boards[step.read] = max(warp.boards[step.read], read)
        warp.at += 1
        if warp.at == len(warp.steps):
            if warp in running:
                running.remove(warp)
            left[warp.program] -= 1
            if left[warp.program] == 0:
                finished.append(now)
                start(now + machine.launch_gap)
    return sorted(finished)
