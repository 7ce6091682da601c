"""What the attention kernels should take on a Hopper GPU, from their machine code. No GPU needed.

    python bench/attention_estimate.py

Every launch of the forward and backward is compiled for sm_90; the instructions of a program are
counted, those in loops with matrix products as often as a sequence of a given length makes them
run; and the counts become cycles of the four resources that can bind: tensor cores, the
exponential unit, instruction issue, and memory. Registers and shared memory give the programs that
share a multiprocessor. Two times come out, and the measured one should lie between them:

    overlapped  the busiest resource, all others hidden behind it
    serial      what one program needs for its phases one after the other, divided by the programs
                that share a multiprocessor; never less than the overlapped time

These are predictions, not measurements. The rates below are the ceilings that were assumed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from masked_vit_kernels import audit, pack_lengths
from masked_vit_kernels.attention.backward import backward_launches
from masked_vit_kernels.attention.forward import forward_launch
from masked_vit_kernels.attention.sequences import Sequences
from masked_vit_kernels.launch import KernelLaunch
from shapes import SHAPES
from torch import Tensor

MULTIPROCESSORS = 132
CLOCK = 1.7e9  # cycles a second under load, assumed
BYTES_PER_SECOND = 4.3e12  # read plus write, a large copy
EXPONENTIALS_PER_CYCLE = 16  # a multiprocessor
ISSUES_PER_CYCLE = 4  # warp instructions, one a scheduler
# mma.sync m16n8k16 on Hopper: 2048 multiply-adds at about 62 % of the 2048 a cycle of wgmma.
CYCLES_PER_HMMA = 1.6
MEMORY_LATENCY = 1500  # cycles from a program's first load to its first product, launch included


@dataclass
class Cycles:
    """Cycles of one multiprocessor that one program occupies of each resource."""

    tensor: float = 0.0
    exponential: float = 0.0
    issue: float = 0.0

    def add(self, opcode: str, warps: int) -> None:
        self.issue += warps / ISSUES_PER_CYCLE
        if opcode.startswith("HGMMA"):
            # 64 x N x 16 a warpgroup: N / 2 cycles, at least what reading A takes.
            width = int(re.search(r"64x(\d+)x16", opcode).group(1))
            self.tensor += max(width / 2, 16) * warps / 4
        elif opcode.startswith("HMMA"):
            self.tensor += CYCLES_PER_HMMA * warps
        elif opcode.startswith("MUFU.EX2"):
            self.exponential += 32 * warps / EXPONENTIALS_PER_CYCLE


@dataclass(frozen=True)
class Program:
    """One launch's code, ready to be counted for any length.

    by_depth[d] is what the instructions inside d nested loops with products cost, run once;
    loops without products (they clear padding) count nothing. `resident` programs share a
    multiprocessor.
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
                times *= self._trips(level, depth, queries, keys)
            total.tensor += times * cost.tensor
            total.exponential += times * cost.exponential
            total.issue += times * cost.issue
        return total

    def _trips(self, level: int, depth: int, queries: int, keys: int) -> int:
        arguments = self.launch.arguments
        tiles_q = -(-queries // arguments["BLOCK_Q"])
        tiles_k = -(-keys // arguments["BLOCK_K"])
        over_keys = arguments.get("KIND") in (None, "flash_queries")
        if arguments.get("KIND") == "two_phase":  # tiles of both are alike: equal lengths
            over_keys = level == depth - 1
        return tiles_k if over_keys else tiles_q


def analyse(launch: KernelLaunch) -> Program:
    compiled = audit.compile_launch(launch, 90)
    found = audit.measure(compiled, 90)
    code = audit.parse_instructions(audit.disassemble(compiled.asm["cubin"]))
    products = [address for address, opcode, _ in code if re.match("HGMMA|HMMA", opcode)]
    loops = []
    for address, opcode, operands in code:
        target = re.search(r"0x([0-9a-f]+)\s*$", operands)
        if opcode.startswith("BRA") and target and int(target.group(1), 16) < address:
            first = int(target.group(1), 16)
            if any(first <= product <= address for product in products):
                loops.append((first, address))
    by_depth = [Cycles() for _ in range(3)]
    clearing = [loop for loop in audit.innermost_loops(code) if loop not in loops]
    for address, opcode, _ in code:
        depth = sum(a <= address <= b for a, b in loops)
        if depth or not any(a <= address <= b for a, b in clearing):
            by_depth[depth].add(opcode, launch.num_warps)
    threads = 32 * launch.num_warps
    registers = -(-found.registers // 8) * 8 * threads
    by_memory = 227 * 1024 // (found.shared_bytes + 1024)
    resident = min(65536 // registers, by_memory, 2048 // threads, 32)
    return Program(launch, tuple(by_depth), resident)


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
    if kind in ("resident", "two_phase"):
        return int(arguments["keys_over"] < length <= arguments["keys_up_to"])
    return -(-length // arguments["BLOCK_K" if kind == "flash_keys" else "BLOCK_Q"])


def estimate(launch: KernelLaunch, lengths: list[int], heads: int) -> dict[str, float]:
    """Microseconds of one launch over all the sequences."""
    program = analyse(launch)
    total, count = Cycles(), 0
    for length in sorted(set(lengths)):
        number = lengths.count(length) * programs_of(launch, length) * heads
        if number:
            one = program.cycles(length, length)
            total.tensor += number * one.tensor
            total.exponential += number * one.exponential
            total.issue += number * one.issue
            count += number
    scale = 1e6 / (MULTIPROCESSORS * CLOCK)
    times = {
        "tensor": total.tensor * scale,
        "exponential": total.exponential * scale,
        "issue": total.issue * scale,
        "latency": count * MEMORY_LATENCY * scale,
    }
    return times | {"resident": program.resident}


def main() -> None:
    print(f"{'shape':34} {'launch':16} {'progs/SM':>8} {'tensor':>7} {'exp':>6} {'issue':>6}"
          f" {'memory':>7} {'overlapped':>10} {'serial':>7}  us")  # fmt: skip
    shape = next(s for s in SHAPES["cuda"] if s.name.startswith("H/14"))
    masks = shape.masks()
    drawn = {
        "target": ([shape.num_patches] * shape.batch, 80),
        "context": (masks.context_packing.cu_seqlens.diff().tolist(), 80),
        "predictor": (masks.predictor_packing.cu_seqlens.diff().tolist(), 24),
    }
    for part, (lengths, head_dim) in drawn.items():
        title = f"{shape.name} {part} D={head_dim}"
        for direction, sequence in launches(lengths, 16, head_dim).items():
            if part == "target" and direction == "backward":
                continue
            _print_direction(title, direction, sequence, lengths, head_dim)


def _print_direction(
    title: str, direction: str, sequence: list[KernelLaunch], lengths: list[int], head_dim: int
) -> None:
    heads = 16
    sums = [0.0, 0.0]
    for launch in sequence:
        times = estimate(launch, lengths, heads)
        kind = launch.arguments.get("KIND", "forward")
        taken = [n for n in lengths if programs_of(launch, n)]
        # rows read and written once: q, k, v, out; or q, k, v, dout, dq, dk, dv and out where read
        rows = {"forward": 4, "resident": 7, "two_phase": 8}.get(kind, 6)
        memory = 1e6 * rows * sum(taken) * heads * head_dim * 2 / BYTES_PER_SECOND
        busy = [times["tensor"], times["exponential"], times["issue"], memory]
        overlapped = max(busy)
        serial = max(overlapped, (sum(busy) + times["latency"]) / times["resident"])
        sums[0] += overlapped
        sums[1] += serial
        print(f"{title:34} {kind:16} {times['resident']:>8} {busy[0]:7.1f} {busy[1]:6.1f}"
              f" {busy[2]:6.1f} {memory:7.1f} {overlapped:10.1f} {serial:7.1f}")  # fmt: skip
    if len(sequence) > 1:
        print(f"{title:34} {direction + ', all':16} {'':45} {sums[0]:3.1f} {sums[1]:7.1f}")


if __name__ == "__main__":
    main()
