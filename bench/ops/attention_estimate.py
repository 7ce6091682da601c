"""What the attention kernels should take on a Hopper GPU, from their machine code. No GPU needed.

    python -m bench.ops.attention_estimate           prints
    python -m bench.ops.attention_estimate --save    and files bench/results/predictions-sm90.json

Every launch of the forward and backward is compiled for sm_90; the instructions of a program that
has work are counted, those in loops with matrix products as often as a sequence of a given length
makes them run; and the counts become cycles of the four resources that can bind: tensor cores, the
exponential unit, instruction issue, and memory. Where a program waits for loads in full, nothing
else in it goes on: those cycles are counted apart. Registers and shared memory give the programs
that share a multiprocessor. Three times come out:

    played      the code of programs drawn from the sequences, played on a model of the
                multiprocessor (`machine_time.py`)
    overlapped  the busiest resource, all others and every wait hidden behind it
    serial      what one program needs for its phases and waits one after the other, divided by the
                programs that share a multiprocessor; never less than the overlapped time

Only the first is to be believed: of 17 tables and 42 tiles that an H200 timed it gave 0.9 of the
time in the mean, with a scatter of a tenth, and their order. The other two count issue slots alone,
while minima, selects and conversions take two each, and know nothing of latencies where four warps
share a scheduler: the overlapped time came to 0.3 to 0.6 of the measured one.

These are predictions, not measurements. The rates below are the ceilings that were assumed.
"""

from __future__ import annotations

import argparse
import functools
import random
import re
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path

import torch
import triton
from masked_vit_kernels import audit, pack_lengths
from masked_vit_kernels.attention.backward import backward_launches
from masked_vit_kernels.attention.forward import forward_launch
from masked_vit_kernels.attention.sequences import Sequences
from masked_vit_kernels.launch import KernelLaunch
from torch import Tensor

from bench.filing import commit, write_json
from bench.ops.bench_attention import BACKWARD_ROWS, FORWARD_ROWS, G16, HEADS, L14, PARTS
from bench.ops.machine_flow import exposed_waits, working_code
from bench.ops.machine_time import HOPPER, Code, microseconds, trace
from bench.sizes import SHAPES, Shape

PREDICTIONS = Path(__file__).parents[1] / "results" / "predictions-sm90.json"
MULTIPROCESSORS = 132
CLOCK = 1.7e9  # cycles a second under load, assumed
BYTES_PER_SECOND = 4.3e12  # read plus write, a large copy
EXPONENTIALS_PER_CYCLE = 16  # a multiprocessor
ISSUES_PER_CYCLE = 4  # warp instructions, one a scheduler
# mma.sync m16n8k16 on Hopper: 2048 multiply-adds at about 62 % of the 2048 a cycle of wgmma.
CYCLES_PER_HMMA = 1.6
LOAD_LATENCY = 500  # cycles; assumed, between an idle L2 cache (270) and memory under load (800)
CACHED_LATENCY = 40  # cycles, of what the L1 cache holds

# What bench_attention.py times on a GPU.
CASES = [(shape, part) for shape in SHAPES["cuda"] for part in PARTS]
CASES += [(G16, "context"), (G16, "target"), (L14, "target")]


@dataclass
class Cycles:
    """Cycles of one multiprocessor that one program occupies of each resource, or waits."""

    tensor: float = 0.0
    exponential: float = 0.0
    issue: float = 0.0
    waiting: float = 0.0

    @classmethod
    def of(cls, opcode: str, warps: int) -> Cycles:
        """What one instruction of all the program's warps costs."""
        cost = cls(issue=warps / ISSUES_PER_CYCLE)
        if opcode.startswith("HGMMA"):
            # 64 x N x 16 a warpgroup: N / 2 cycles, at least what reading A takes.
            (width,) = map(int, re.findall(r"64x(\d+)x16", opcode))
            cost.tensor = max(width / 2, 16) * warps / 4
        elif opcode.startswith("HMMA"):
            cost.tensor = CYCLES_PER_HMMA * warps
        elif opcode.startswith("MUFU.EX2"):
            cost.exponential = 32 * warps / EXPONENTIALS_PER_CYCLE
        return cost

    def add(self, other: Cycles, times: float = 1) -> None:
        for field in fields(self):
            more = times * getattr(other, field.name)
            setattr(self, field.name, getattr(self, field.name) + more)

    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Program:
    """One launch's code, ready to be counted for any length.

    by_depth[d] is what the instructions inside d nested loops with products cost, run once.
    `resident` programs share a multiprocessor.
    """

    launch: KernelLaunch
    by_depth: tuple[Cycles, ...]
    resident: int

    def cycles(self, queries: int, keys: int) -> Cycles:
        """The cycles of one program of a sequence of that many queries and keys."""
        total = Cycles()
        for depth, cost in enumerate(self.by_depth):
            times = 1
            for level in range(depth):
                times *= self.trips(queries, keys, level, depth)
            total.add(cost, times)
        return total

    def trips(self, queries: int, keys: int, level: int, depth: int) -> int:
        """How often a loop runs: the `level`-th from outside of `depth` nested ones."""
        arguments = self.launch.arguments
        tiles_q = -(-queries // arguments["BLOCK_Q"])
        tiles_k = -(-keys // arguments["BLOCK_K"])
        over_keys = arguments.get("KIND") in (None, "flash_queries")
        if arguments.get("KIND") == "two_phase":  # tiles of both are alike: equal lengths
            over_keys = level == depth - 1
        return tiles_k if over_keys else tiles_q


def count(sass: str, warps: int) -> tuple[Cycles, ...]:
    """`Program.by_depth` of a kernel's machine code, as nvdisasm prints it."""
    code = working_code(sass)
    by_depth = [Cycles() for _ in range(3)]
    for address, opcode, _ in code.instructions:
        by_depth[code.depth_of(address)].add(Cycles.of(opcode, warps))
    waits = exposed_waits(
        code, lambda opcode: Cycles.of(opcode, warps).total(), LOAD_LATENCY, CACHED_LATENCY
    )
    for depth, cycles in waits.items():
        by_depth[depth].waiting = cycles
    return tuple(by_depth)


def analyse(launch: KernelLaunch) -> Program:
    """Compile a launch for sm_90 and count its code."""
    compiled = audit.compile_launch(launch, 90)
    found = audit.measure(compiled, 90)
    threads = 32 * launch.num_warps
    registers = -(-found.registers // 8) * 8 * threads
    by_memory = 227 * 1024 // (found.shared_bytes + 1024)
    resident = min(65536 // registers, by_memory, 2048 // threads, 32)
    by_depth = count(audit.disassemble(compiled.asm["cubin"]), launch.num_warps)
    return Program(launch, by_depth, resident)


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(lengths: list[int], heads: int, head_dim: int) -> dict[str, list[KernelLaunch]]:
    """The real launches for these sequences, built on the meta device."""
    packing = pack_lengths(lengths).to("meta")
    total, longest, scale = packing.capacity, packing.max_seqlen, head_dim**-0.5
    q, k, v = _meta(total, 3, heads, head_dim).unbind(1)
    dq, dk, dv = _meta(total, 3, heads, head_dim).unbind(1)
    out, dout = _meta(total, heads, head_dim), _meta(total, heads, head_dim)
    lse = _meta(heads, total, dtype=torch.float32)
    side = Sequences.of(packing.cu_seqlens, longest, packing)
    forward = forward_launch(
        q=q, k=k, v=v, out=out, lse=lse, queries=side, keys=side, softmax_scale=scale,
        capability=90,
    )  # fmt: skip
    backward = backward_launches(
        q=q, k=k, v=v, out=out, dout=dout, lse=lse, delta=lse, dq=dq, dk=dk, dv=dv,
        queries=side, keys=side, softmax_scale=scale, capability=90,
    )  # fmt: skip
    return {"forward": [forward], "backward": backward}


def programs_of(launch: KernelLaunch, length: int) -> int:
    """Programs a head that one sequence of this length needs from the launch."""
    arguments = launch.arguments
    kind = arguments.get("KIND")
    if kind is not None and not arguments["keys_over"] < length <= arguments["keys_up_to"]:
        return 0
    if kind in ("resident", "two_phase"):
        return 1
    return -(-length // arguments["BLOCK_K" if kind == "flash_keys" else "BLOCK_Q"])


def estimate(launch: KernelLaunch, lengths: list[int], heads: int) -> dict[str, float]:
    """Microseconds of one launch over all the sequences, and the programs on a multiprocessor."""
    program = analyse(launch)
    total = Cycles()
    for length in sorted(set(lengths)):
        number = lengths.count(length) * programs_of(launch, length) * heads
        total.add(program.cycles(length, length), number)
    scale = 1e6 / (MULTIPROCESSORS * CLOCK)
    times = {field.name: getattr(total, field.name) * scale for field in fields(total)}
    kind = launch.arguments.get("KIND", "forward")
    tokens = sum(length for length in lengths if programs_of(launch, length))
    # rows read and written once: q, k, v, out; or q, k, v, dout, dq, dk, dv and out where read
    rows = {"forward": 4, "resident": 7, "two_phase": 8}.get(kind, 6)
    row_bytes = heads * launch.arguments["HEAD_DIM"] * 2
    times["memory"] = 1e6 * rows * tokens * row_bytes / BYTES_PER_SECOND
    busy = [times[name] for name in ("tensor", "exponential", "issue", "memory")]
    overlapped = max(busy)
    serial = max(overlapped, (sum(busy) + times["waiting"]) / program.resident)
    return times | {"overlapped": overlapped, "serial": serial, "resident": program.resident}


def played(launch: KernelLaunch, lengths: list[int], heads: int) -> float:
    """Microseconds of one launch by `machine_time`, over programs drawn from all of its own."""
    program, code = analyse(launch), Code.of(audit.compile_launch(launch, 90).asm["cubin"])
    work = sorted(n for n in lengths for _ in range(programs_of(launch, n)))
    if not work:
        return 0.0
    number = min(max(6 * program.resident, 18), len(work) * heads)
    drawn = [work[int((i + 0.5) * len(work) / number)] for i in range(number)]
    random.Random(0).shuffle(drawn)
    steps = code.steps(HOPPER)
    traces = {
        n: trace(code.working, steps, functools.partial(program.trips, n, n)) for n in set(drawn)
    }
    arguments = launch.arguments
    head_dim = arguments["HEAD_DIM"]
    rows = {None: 3, "resident": 4, "two_phase": 5}.get(arguments.get("KIND"), 4)
    tokens = sum(n for n in lengths if programs_of(launch, n))
    return microseconds(
        [traces[n] for n in drawn],
        programs=len(work) * heads / MULTIPROCESSORS,
        warps=launch.num_warps,
        resident=program.resident,
        read_once=2.0 * rows * tokens * head_dim / len(work),
        useful=head_dim / (arguments["MAIN"] + arguments["REST"]),
    )


def lengths_of(shape: Shape, part: str) -> list[int]:
    """Tokens of every sequence, as bench_attention.py packs them."""
    if part == "target":
        return [shape.num_patches] * shape.batch
    masks = shape.masks()
    drawn = masks.context_packing if part == "context" else masks.predictor_packing
    return drawn.cu_seqlens.diff().tolist()


def predictions() -> list[dict]:
    """A row for every attention table of the benches, with the same facts; prints as it goes.

    `played_us`, `overlapped_us`, `serial_us`: microseconds; `share_of_floor`: of the played and the
    overlapped time, the floor being the ideal bytes at BYTES_PER_SECOND.
    """
    print(f"{'shape':46} {'launch':13} {'progs/SM':>8} {'tensor':>6} {'exp':>6} {'issue':>6}"
          f" {'memory':>6} {'waiting':>7} {'overlapped':>10} {'serial':>7}"
          f" {'played':>7}  us")  # fmt: skip
    rows = []
    for shape, part in CASES:
        heads, lengths = HEADS[shape.name[0]], lengths_of(shape, part)
        head_dim = (shape.predictor_width if part == "predictor" else shape.width) // heads
        facts = {
            "op": "attention", "shape": f"{shape.name} {part}", "part": part, "head_dim": head_dim,
            "longest": max(lengths), "equal_lengths": part == "target",
        }  # fmt: skip
        for direction, sequence in launches(lengths, heads, head_dim).items():
            ideal_rows = FORWARD_ROWS if direction == "forward" else BACKWARD_ROWS
            floor = 1e6 * ideal_rows * sum(lengths) * heads * head_dim * 2 / BYTES_PER_SECOND
            overlapped, serial, by_play = _times(
                sequence, lengths, heads, f"{facts['shape']} D={head_dim}"
            )
            share = sorted(round(floor / time, 3) for time in (by_play, overlapped))
            print(f"{'':46} {direction}: {by_play:.1f} us played, {overlapped:.1f} overlapped;"
                  f" {share[0]:.0%} to {share[1]:.0%} of the floor")  # fmt: skip
            rows.append({
                **facts, "direction": direction, "overlapped_us": round(overlapped, 1),
                "serial_us": round(serial, 1), "played_us": round(by_play, 1),
                "share_of_floor": share,
            })  # fmt: skip
    return rows


def _times(
    sequence: list[KernelLaunch], lengths: list[int], heads: int, title: str
) -> tuple[float, float, float]:
    """Overlapped, serial and played microseconds of launches one after the other."""
    overlapped = serial = by_play = 0.0
    for launch in sequence:
        if not any(programs_of(launch, length) for length in lengths):
            continue
        times = estimate(launch, lengths, heads)
        overlapped += times["overlapped"]
        serial += times["serial"]
        by_play += (one := played(launch, lengths, heads))
        print(f"{title:46} {launch.arguments.get('KIND', 'forward'):13} {times['resident']:>8}"
              f" {times['tensor']:6.1f} {times['exponential']:6.1f} {times['issue']:6.1f}"
              f" {times['memory']:6.1f} {times['waiting']:7.1f} {times['overlapped']:10.1f}"
              f" {times['serial']:7.1f} {one:7.1f}", flush=True)  # fmt: skip
    return overlapped, serial, by_play


def save(rows: list[dict], path: Path) -> None:
    """File the predictions with what they were computed from."""
    assumed = {
        "multiprocessors": MULTIPROCESSORS, "clock_hz": CLOCK, "load_latency": LOAD_LATENCY,
        "cached_latency": CACHED_LATENCY, "copy_gigabytes_per_second": BYTES_PER_SECOND / 1e9,
    }  # fmt: skip
    filed = {
        "commit": commit(), "date": date.today().isoformat(), "triton": triton.__version__,
        "assumed": assumed, "predictions": rows,
    }  # fmt: skip
    write_json(path, filed)


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help=f"write {PREDICTIONS.name}")
    options = parser.parse_args()
    rows = predictions()
    if options.save:
        save(rows, PREDICTIONS)


if __name__ == "__main__":
    main()
