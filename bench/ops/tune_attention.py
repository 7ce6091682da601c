"""Times every sensible tile of the attention kernels at the shapes that matter, on a GPU.

    python -m bench.ops.tune_attention --out OUT/tune.json [--parts "H/14 batch 128 context"]

Every candidate is compiled and held to float64 first, in many processes at once, each candidate
that faults in a process of its own; then those that are right are timed one after the other. The
launch tables of the op library are written from what this prints.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from masked_vit_kernels import audit, pack_lengths
from masked_vit_kernels.attention.backward import backward_launches, backward_scratch
from masked_vit_kernels.attention.config import (
    NO_LIMIT,
    AttentionConfig,
    BackwardStep,
    backward_plan,
    forward_config,
)
from masked_vit_kernels.attention.forward import forward_launch
from masked_vit_kernels.attention.sequences import Sequences
from masked_vit_kernels.catalogue.sizes import HEAD_DIMS
from masked_vit_kernels.launch import KernelLaunch, table_capability

from bench.ops.bench_attention import CASES, HEADS, packed_part
from bench.timing import graph_of, rounds_of

LENGTHS = (129, 197, 0, 256, 16, 65, 1, 128, 64, 63, 150, 200)  # of the check
# The launch tables' own tiles, those that the model of machine_time.py puts close to them, and what
# an H200 ran fastest before.
FORWARD = (
    (64, 64, 4, 3, 80), (64, 32, 4, 3, 80), (64, 32, 4, 3, 96), (64, 32, 4, 4, 96),
    (64, 32, 4, 3, 128), (64, 64, 4, 2, 128), (64, 64, 4, 3, 128), (128, 64, 8, 2, 128),
    (128, 64, 8, 3, 128), (64, 64, 4, 2), (64, 128, 4, 1),
)  # fmt: skip
RESIDENT_128 = ((32, 128, 8, 1, 128), (64, 128, 8, 1))
TWO_PHASE = ((64, 64, 4, 1, 168), (64, 64, 4, 1, 128))
FLASH_QUERIES = (
    (64, 32, 4, 3, 80), (64, 32, 4, 3, 96), (64, 32, 4, 3, 128), (64, 32, 4, 2, 128),
    (64, 32, 4, 3, 168), (64, 64, 4, 2), (64, 64, 4, 3),
)  # fmt: skip
FLASH_KEYS = (
    (32, 64, 4, 3, 80), (32, 64, 4, 2, 80), (32, 64, 4, 2, 128), (32, 64, 4, 3, 128),
    (32, 64, 4, 2, 168), (32, 64, 4, 3), (64, 64, 4, 2), (64, 128, 8, 2),
)  # fmt: skip


def backward_kinds() -> list[tuple[str, tuple]]:
    """(kind, tile) of every backward candidate; "resident" by the keys it holds."""
    kinds = {
        "resident": RESIDENT_128, "two_phase": TWO_PHASE,
        "flash_queries": FLASH_QUERIES, "flash_keys": FLASH_KEYS,
    }  # fmt: skip
    return [(kind, tile) for kind, tiles in kinds.items() for tile in tiles]


def exact(q, k, v, dout, lengths, scale):
    """out, dq, dk, dv in float64 on the device."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    outputs, bounds = [], pack_lengths(list(lengths)).cu_seqlens.tolist()
    for a, b in pairwise(bounds):
        qs, ks, vs = (x[a:b].transpose(0, 1) for x in leaves)
        outputs.append(((qs @ ks.transpose(1, 2) * scale).softmax(-1) @ vs).transpose(0, 1))
    out = torch.cat(outputs)
    return [out, *torch.autograd.grad(out, leaves, dout.double())]


def check(head_dim: int, kind: str, tile: tuple) -> dict:
    """Errors of one candidate over `LENGTHS`, relative to the largest exact value."""
    torch.manual_seed(head_dim)
    longest_keys = tile[1] if kind == "resident" else 256
    lengths = [min(n, longest_keys) for n in LENGTHS]
    packing = pack_lengths(lengths, capacity=sum(lengths) + 70).to("cuda")
    heads, total, scale = 3, sum(lengths), head_dim**-0.5
    qkv = torch.randn(packing.capacity, 3, heads, head_dim, device="cuda").bfloat16()
    dout = torch.randn(packing.capacity, heads, head_dim, device="cuda").bfloat16()
    q, k, v = qkv.unbind(1)
    wanted = exact(q[:total], k[:total], v[:total], dout[:total], lengths, scale)
    out = torch.full_like(dout, float("nan"))
    lse = torch.full((heads, packing.capacity), float("nan"), device="cuda")
    gradient = torch.full_like(qkv, float("nan"))
    side = Sequences.of(packing.cu_seqlens, max(lengths), packing)
    given = {
        "q": q, "k": k, "v": v, "out": out, "lse": lse, "queries": side, "keys": side,
        "softmax_scale": scale,
    }  # fmt: skip
    config = AttentionConfig(*tile) if kind == "forward" else None
    first = forward_launch(**given, config=config)
    _refuse_miscompiled(first)
    first.run()
    found = {"out": (out[:total], wanted[0])}
    if kind != "forward":
        steps = [BackwardStep(kind, AttentionConfig(*tile))]
        if kind == "flash_keys":  # delta comes from the queries' launch
            steps.insert(0, BackwardStep("flash_queries", AttentionConfig(64, 64, 4, 2)))
        gradients = gradient.unbind(1)
        dq, dk, dv = gradients
        for launch in backward_launches(
            **given, dout=dout, delta=backward_scratch(q), dq=dq, dk=dk, dv=dv, plan=tuple(steps)
        ):
            _refuse_miscompiled(launch)
            launch.run()
        written = {"flash_queries": ("dq",), "flash_keys": ("dk", "dv")}
        for name, values, right in zip(("dq", "dk", "dv"), gradients, wanted[1:], strict=True):
            if name in written.get(kind, (name,)):
                found[name] = (values[:total], right)
    torch.cuda.synchronize()
    errors = {}
    for name, (values, right) in found.items():
        difference = (values.double() - right).abs()
        errors[name] = (difference.max() / right.abs().max()).item()
        if not errors[name] < 0.02:
            wrong = difference > 0.05 * right.abs().max()
            errors[f"{name} wrong rows"] = [int(i) for i in wrong.any(2).any(1).nonzero()[:6, 0]]
            errors[f"{name} wrong columns"] = [int(i) for i in wrong.any(0).any(0).nonzero()[:, 0]]
            errors[f"{name} wrong share"] = wrong.float().mean().item()
    return errors


def _refuse_miscompiled(launch: KernelLaunch) -> None:
    """Raise where the machine code would read the wrong shared memory, before it faults."""
    compiled = audit.compile_launch(launch, table_capability(torch.device("cuda")))
    if wrong := audit.foreign_descriptors(audit.disassemble(compiled.asm["cubin"])):
        raise RuntimeError(f"miscompiled: {len(wrong)} products read the wrong shared memory")


def candidates() -> list[tuple[int, str, tuple]]:
    kinds = [("forward", tile) for tile in FORWARD] + backward_kinds()
    return [(head_dim, kind, tile) for kind, tile in kinds for head_dim in HEAD_DIMS]


def check_share(number: int, shares: int, folder: Path) -> None:
    """Check every `shares`-th candidate that has no line yet; the line goes out before it runs."""
    path = folder / f"checked-{number}.jsonl"
    done = (
        [json.loads(line)["of"] for line in path.read_text().splitlines()] if path.exists() else []
    )
    for candidate in candidates()[number::shares]:
        if [*candidate[:2], list(candidate[2])] in done:
            continue
        with path.open("a") as file:
            file.write(json.dumps({"of": candidate, "error": "faulted"}) + "\n")
            file.flush()
            outcome: dict[str, Any]
            try:
                start = time.perf_counter()
                outcome = {"errors": check(*candidate), "seconds": time.perf_counter() - start}
            except Exception as error:
                outcome = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
            file.write(json.dumps({"of": candidate, **outcome}) + "\n")
        failure = outcome.get("error", "")
        if "illegal" in failure or "CUDA error" in failure:
            sys.exit(1)  # this process's context is lost


def check_all(folder: Path, processes: int, seconds: float) -> dict[str, dict]:
    """Candidate to its last line."""
    end = time.perf_counter() + seconds
    command = [sys.executable, "-m", "bench.ops.tune_attention", "--out", str(folder / "unused")]
    running: dict[int, subprocess.Popen | None] = dict.fromkeys(range(processes))
    while running and time.perf_counter() < end:
        for number, process in list(running.items()):
            if process is None or process.poll() not in (None, 0):
                running[number] = subprocess.Popen([*command, "--share", f"{number}/{processes}"])
            elif process.poll() == 0:
                del running[number]
        time.sleep(0.2)
    for process in running.values():
        if process is not None:
            process.kill()
    lines = {}
    for path in folder.glob("checked-*.jsonl"):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            lines[json.dumps(entry["of"])] = entry
    return lines


def right(entry: dict | None) -> bool:
    errors = (entry or {}).get("errors", {})
    return bool(errors) and all(errors[n] < 0.02 for n in ("out", "dq", "dk", "dv") if n in errors)


def time_shape(shape, part: str, checked: dict[str, dict]) -> dict:
    """Microseconds of every candidate, and of today's choice, at one shape."""
    width = shape.predictor_width if part == "predictor" else shape.width
    heads = HEADS[shape.name[0]]
    head_dim, scale = width // heads, (width // heads) ** -0.5
    packing = packed_part(shape, part).to("cuda")
    longest, total = packing.max_seqlen, packing.capacity
    side = Sequences.of(packing.cu_seqlens, longest, packing)
    element_bytes = 2 * total * heads * head_dim
    sets = []
    for _ in range(max(2, min(6, -(-(128 << 20) // (8 * element_bytes))))):
        qkv = torch.randn(total, 3, heads, head_dim, device="cuda").bfloat16()
        out, dout = (
            torch.randn(total, heads, head_dim, device="cuda").bfloat16() for _ in range(2)
        )
        lse = torch.empty(heads, total, device="cuda")
        q, k, v = qkv.unbind(1)
        dq, dk, dv = torch.empty_like(qkv).unbind(1)
        given = {
            "q": q, "k": k, "v": v, "out": out, "lse": lse, "queries": side, "keys": side,
            "softmax_scale": scale,
        }  # fmt: skip
        sets.append((given, {"dout": dout, "dq": dq, "dk": dk, "dv": dv}))
        forward_launch(**given).run()
    delta = backward_scratch(q)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def forward(config):
        return [forward_launch(**given, config=config).run for given, _ in sets]

    def backward(step: BackwardStep):
        runs = []
        for given, gradients in sets:
            both = given | gradients
            runs += [launch.run for launch in backward_launches(**both, delta=delta, plan=(step,))]
        return runs

    def microseconds(functions) -> float:
        with torch.cuda.stream(stream):
            repeats = max(1, 12 // len(functions))
            graph = graph_of(functions * repeats, stream)
            if graph is None:
                raise RuntimeError("our own launches could not be captured")
            rounds = rounds_of({"it": [graph.replay]}, "cuda")["it"]
        return 1e6 * sorted(rounds)[len(rounds) // 2] / repeats / len(sets)

    def known(kind: str, tile: tuple) -> bool:
        return right(checked.get(json.dumps([head_dim, kind, list(tile)])))

    times: dict[str, float] = {}
    today = forward_config(head_dim, longest, longest, torch.bfloat16, 90)
    times["forward today " + str(today)] = microseconds(forward(today))
    for tile in FORWARD:
        if known("forward", tile):
            times[f"forward {tile}"] = microseconds(forward(AttentionConfig(*tile)))
    if part != "target":
        for step in backward_plan(head_dim, longest, longest, torch.bfloat16, 90):
            name = f"{step.kind} {step.config} over {step.keys_over} to {step.keys_up_to}"
            tile = tuple(v for v in vars(step.config).values() if v is not None)
            if known(step.kind, tile):
                times["backward today " + name] = microseconds(backward(step))
        limits = [(-1, 128), (128, NO_LIMIT)] if longest > 128 else [(-1, NO_LIMIT)]
        limits = limits if longest <= 256 else [(-1, NO_LIMIT)]
        for kind, tile in backward_kinds():
            for over, up_to in limits:
                fits = kind != "resident" or min(up_to, longest) <= tile[1]
                if (longest > 256 and "flash" not in kind) or not fits or not known(kind, tile):
                    continue
                if "flash" in kind and over != limits[0][0]:
                    continue
                bound = (over, up_to) if "flash" not in kind else (-1, NO_LIMIT)
                step = BackwardStep(kind, AttentionConfig(*tile), *bound)
                name = f"{kind} {tile}" + ("" if bound == (-1, NO_LIMIT) else f" keys {bound}")
                times[name] = microseconds(backward(step))
    facts = {
        "head_dim": head_dim, "longest": longest, "sequences": packing.num_sequences,
        "forward_floor_us": 4 * element_bytes / 4.3e6,
        "backward_floor_us": 8 * element_bytes / 4.3e6,
    }  # fmt: skip
    return {**facts, "us": times}


def main() -> None:
    """Check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default="")
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--share", help="internal: number/shares")
    arguments = parser.parse_args()
    folder = arguments.out.parent
    if arguments.share:
        number, shares = map(int, arguments.share.split("/"))
        check_share(number, shares, folder)
        return
    os.environ.setdefault("BENCH_ROUNDS", "8")
    checked = check_all(folder, arguments.processes, arguments.seconds)
    bad = [entry for entry in checked.values() if not right(entry)]
    print(f"{len(checked)} of {len(candidates())} candidates checked, {len(bad)} not right")
    for entry in bad:
        print("  ", json.dumps(entry)[:330])
    shapes: dict[str, dict] = {}
    results = {"checked": list(checked.values()), "shapes": shapes}
    for _, shape, part in CASES:
        name = f"{shape.name} {part}"
        if arguments.parts and name not in arguments.parts:
            continue
        try:
            shapes[name] = found = time_shape(shape, part, checked)
        except Exception as error:
            print(name, type(error).__name__, str(error)[:300])
            continue
        arguments.out.write_text(json.dumps(results))
        print(f"{name}: D={found['head_dim']}, floors {found['forward_floor_us']:.0f} and"
              f" {found['backward_floor_us']:.0f} us")  # fmt: skip
        for label, value in sorted(found["us"].items(), key=lambda item: item[1]):
            print(f"  {value:8.1f} {label}")


if __name__ == "__main__":
    main()
