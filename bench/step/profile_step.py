"""Where a step's time goes: the profiler's sums by kernel and by kind, as text and JSON.

python -m bench.step.profile_step --size B/16 --out profile.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.step.bench_step import COMPILE, DEVICE, ON_GPU, SIZES, draw_masks
from bench.step.ours import Ours
from ijepa import IJEPA

STEPS = 3
KINDS = (  # first match wins
    ("attention", ("varlen_attention", "attention", "sdpa", "flash")),
    ("matmul", ("gemm", "aten::mm", "addmm", "bmm", "nvjet", "cutlass", "xmma")),
    ("optimiser", ("adamw", "multi_tensor", "foreach", "fused_adam", "lerp")),
    ("copy", ("memcpy", "memset", "copy_")),
    ("norm", ("layer_norm", "layernorm")),
    ("gelu", ("gelu",)),
    ("gather", ("gather", "scatter", "index", "patch_rows", "assemble", "position")),
)


def kind_of(name: str) -> str:
    """The first kind whose words occur in a kernel's name."""
    lowered = name.lower()
    found = (kind for kind, words in KINDS if any(word in lowered for word in words))
    return next(found, "other")


def main() -> None:
    """Profile a few warm steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="demo", choices=list(SIZES))
    parser.add_argument("--batching", default="packed", choices=["packed", "truncate"])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    precision = "bf16-params" if ON_GPU else "fp32"
    compile = "blocks" if COMPILE else False
    step = Ours(IJEPA(size.config).to(DEVICE), precision, compile=compile)
    shape = (size.batch, size.config.channels, *size.config.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
    batches = draw_masks(size, arguments.batching)
    for masks in batches * 2:
        step(images, masks)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * ON_GPU
    with profile(activities=activities) as profiler:
        for number in range(STEPS):
            step(images, batches[number % len(batches)])
        if ON_GPU:
            torch.cuda.synchronize()
    rows = []
    for event in profiler.key_averages():
        spent = event.self_device_time_total if ON_GPU else event.self_cpu_time_total
        if spent > 0:
            row = {"name": event.key, "kind": kind_of(event.key), "ms": spent / 1e3 / STEPS}
            rows.append(row | {"calls": event.count / STEPS})
    rows.sort(key=lambda row: -row["ms"])
    kinds: dict[str, float] = {}
    for row in rows:
        kinds[row["kind"]] = kinds.get(row["kind"], 0.0) + row["ms"]
    total = sum(kinds.values())
    kinds = dict(sorted(kinds.items(), key=lambda item: -item[1]))
    for kind, ms in kinds.items():
        print(f"{kind:12} {ms:9.2f} ms {100 * ms / total:5.1f} %")
    for row in rows[:30]:
        print(f"{row['ms']:9.3f} ms {row['calls']:7.1f} calls  {row['kind']:10} {row['name'][:90]}")
    result = {"size": arguments.size, "batching": arguments.batching, "kinds_ms": kinds}
    arguments.out.write_text(json.dumps(result | {"kernels": rows[:60]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
