"""The whole training step against the released style and the best of PyTorch's own parts.

    pytest bench/step/bench_step.py -s                  CPU sizes here, GPU sizes where a GPU is
    BENCH_SIZES="B/16" BENCH_COMPILE=1 pytest bench/step/bench_step.py -s
    BENCH_PROVIDERS="compiled|released" pytest bench/step/bench_step.py -s -k truncate

Synthetic images, masks as the sampler draws them, in both modes: "truncate" gives every provider
the very same tokens and is what ratios are taken from; "packed" keeps every image's own context,
which the dense providers cannot represent, so that only ours run. Losses of the first step are
compared; a provider that fails or differs fails the bench once the others' figures are filed.

Steps are timed on the wall clock between two waits for the device, five of them on a GPU, optimiser
included, and the host's reads where a provider makes them. On a CPU all cores are used; with
BENCH_THREADS=1 the process's clock counts instead, for machines that other jobs share. The median
of the rounds counts: on a CPU they are interleaved; on a GPU one provider after the other is built,
timed, filed and taken down, so that each has the memory to itself and a run that ends early keeps
what it has measured. "blocks compiled" traces one transformer block of each network instead of all
of them: seconds instead of minutes. MFU is the share of a large matrix product's rate on the same
machine, measured in the same run, in float32 for fp32 runs and bfloat16 for the others. Phases are
timed apart, with a wait at each boundary, in steps that are not compiled.
"""

from __future__ import annotations

import copy
import functools
import gc
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from masked_vit_kernels import linear
from masked_vit_kernels.packing import TILE

from bench.filing import device_name, save_step
from bench.step.best_stock import BestStock
from bench.step.ours import Ours
from bench.step.released_style import ReleasedStyle
from bench.step.without_kernels import WithoutKernels
from ijepa import IJEPA, MaskBatch, ModelConfig, MultiBlockSampler
from ijepa.config import VIT_SIZES
from ijepa.cost.flops import count_tokens, step_flops
from ijepa.counter_rng import derive_keys
from ijepa.masks.capacities import plan_capacities


@dataclass(frozen=True)
class Size:
    """A model and the batch it is timed at."""

    config: ModelConfig
    batch: int


def _vit(kind: str, patch: int, predictor_depth: int, pixels: int = 224) -> ModelConfig:
    return ModelConfig(
        image_size=(pixels, pixels), patch_size=(patch, patch), predictor_depth=predictor_depth,
        predictor_heads=VIT_SIZES[kind]["heads"], **VIT_SIZES[kind],
    )  # fmt: skip


GPU_SIZES = {
    "T/16": Size(_vit("T", 16, 6), 256),
    "S/16": Size(_vit("S", 16, 6), 256),
    "B/16": Size(_vit("B", 16, 6), 256),
    "L/16": Size(_vit("L", 16, 12), 128),
    "H/14": Size(_vit("H", 14, 12), 128),
    "H/16-448": Size(_vit("H", 16, 12, 448), 32),
}
CPU_SIZES = {
    "demo": Size(
        ModelConfig(
            image_size=(32, 32), patch_size=(4, 4), width=96, depth=4, heads=4,
            predictor_width=48, predictor_depth=2, predictor_heads=2,
        ),
        16,
    ),
    "small": Size(
        ModelConfig(
            image_size=(64, 64), patch_size=(8, 8), width=192, depth=8, heads=6,
            predictor_width=96, predictor_depth=4, predictor_heads=6,
        ),
        16,
    ),
    "B/16": Size(_vit("B", 16, 6), 8),
}  # fmt: skip
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SIZES = GPU_SIZES if ON_GPU else CPU_SIZES
CHOSEN = os.environ.get("BENCH_SIZES", ",".join(SIZES) if ON_GPU else "demo,small").split(",")
PRECISIONS = os.environ.get("BENCH_PRECISIONS", "bf16" if ON_GPU else "fp32").split(",")
COMPILE = ON_GPU or os.environ.get("BENCH_COMPILE") == "1"
THREADS = None if ON_GPU else int(os.environ.get("BENCH_THREADS", torch.get_num_threads()))
PROVIDERS = os.environ.get("BENCH_PROVIDERS", "")  # a pattern of their names
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "6" if ON_GPU else "7"))
BATCHES = 3  # mask batches in rotation

STEPS_A_ROUND = 5 if ON_GPU else 1

Provider = Callable[..., torch.Tensor | float]  # (images, masks) -> loss


def make_providers(precision: str, batching: str) -> dict[str, Callable[[IJEPA], Provider]]:
    """Name to what builds it around a model of its own, ours first."""
    parameters = f"{precision}-params"
    builders: dict[str, Callable[[IJEPA], Provider]] = {}
    if ON_GPU:
        builders["ours, bf16 weights, blocks compiled, graph"] = functools.partial(
            Ours, precision=parameters, compile="blocks", cuda_graph=True
        )
        builders["ours, bf16 weights and residual, blocks compiled, graph"] = lambda model: Ours(
            with_bf16_residual(model), parameters, compile="blocks", cuda_graph=True
        )
        builders["ours, bf16 weights, fp8 targets, blocks compiled, graph"] = functools.partial(
            Ours, precision=parameters, target_precision="fp8", compile="blocks", cuda_graph=True
        )
        builders["ours, bf16 weights, compiled, graph"] = functools.partial(
            Ours, precision=parameters, compile=True, cuda_graph=True
        )
        builders["ours, blocks compiled, graph"] = functools.partial(
            Ours, precision=precision, compile="blocks", cuda_graph=True
        )
    builders["ours"] = functools.partial(Ours, precision=precision)
    if COMPILE:
        builders["ours, compiled"] = functools.partial(Ours, precision=precision, compile=True)
    if precision == "bf16" and not ON_GPU:
        builders["ours, bf16 weights"] = functools.partial(Ours, precision=parameters)
    builders["ours without kernels"] = functools.partial(WithoutKernels, precision=precision)
    if batching == "truncate":
        if ON_GPU:
            builders["best stock, blocks compiled, graph"] = functools.partial(
                BestStock, precision=precision, compile="blocks", cuda_graph=True
            )
        builders["released style"] = functools.partial(ReleasedStyle, precision=precision)
        builders["best stock"] = functools.partial(BestStock, precision=precision)
        if COMPILE:
            builders["best stock, compiled"] = functools.partial(
                BestStock, precision=precision, compile=True, cuda_graph=ON_GPU
            )
    return {name: build for name, build in builders.items() if re.search(PROVIDERS, name)}


def with_bf16_residual(model: IJEPA) -> IJEPA:
    """The model with another setting of `ModelConfig.residual`."""
    for part in (model.context_encoder, model.target_encoder, model.predictor):
        part.residual = "bf16"
    return model


def draw_masks(size: Size, batching: str) -> list[MaskBatch]:
    """Batches of masks; packed ones padded as a run on this device pads them."""
    sampler = MultiBlockSampler(size.config.grid, batching=batching)
    if batching == "packed":
        sampler.capacities = plan_capacities(sampler, size.batch) if ON_GPU else TILE
    count = BATCHES if batching == "packed" else 1  # dense shapes differ from draw to draw
    return [sampler(keys=derive_keys(7, n, np.arange(size.batch))).to(DEVICE) for n in range(count)]


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def now() -> float:
    return time.process_time() if THREADS == 1 else time.perf_counter()


def time_rounds(providers: dict[str, Provider], images, batches) -> dict[str, list[float]]:
    """Seconds a step of every round of every provider, interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for number in range(ROUNDS):
        for name, step in providers.items():
            synchronize()
            start = now()
            for turn in range(STEPS_A_ROUND):
                step(images, batches[(number + turn) % len(batches)])
            synchronize()
            seconds[name].append((now() - start) / STEPS_A_ROUND)
    return seconds


def time_phases(step: Provider, images, masks) -> dict[str, float]:
    """Milliseconds of each phase, medians of five steps."""
    laps: dict[str, list[float]] = {}
    for _ in range(5):
        synchronize()
        last = now()

        def clock(phase: str) -> None:
            nonlocal last
            synchronize()
            laps.setdefault(phase, []).append(1e3 * (now() - last))
            last = now()

        step(images, masks, clock)
    return {phase: statistics.median(values) for phase, values in laps.items()}


def peak_memory(step: Provider, images, masks) -> float | None:
    """GiB above what is allocated between steps plus that, None on the CPU."""
    if not ON_GPU:
        return None
    torch.cuda.reset_peak_memory_stats()
    step(images, masks)
    synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def matmul_rate(precision: str) -> float:
    """FLOP/s of a large square product of random numbers, by the fastest library there is."""
    size, repeats = (8192, 20) if ON_GPU else (1024, 3)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    best = float("inf")
    for product in (torch.mm, linear) * 10:
        synchronize()
        start = now()
        for _ in range(repeats):
            product(a, b)
        synchronize()
        best = min(best, (now() - start) / repeats)
    return 2 * size**3 / best


@pytest.mark.parametrize("batching", ["truncate", "packed"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CHOSEN)
def test_step(name, precision, batching):
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS or threads)
    try:
        rows = run(name, precision, batching)
    finally:
        torch.set_num_threads(threads)
    assert all(row["ms"] > 0 for row in rows.values())


def run(name: str, precision: str, batching: str) -> dict[str, dict]:
    """Check, time, print and file one table, which is filed anew after every group of providers."""
    size = SIZES[name]
    torch.manual_seed(0)
    model = IJEPA(size.config).to(DEVICE)
    shape = (size.batch, size.config.channels, *size.config.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
    batches = draw_masks(size, batching)
    tokens = count_tokens(batches[0].to("cpu"))
    flops = size.batch * sum(part.total for part in step_flops(size.config, tokens).values())
    rate = matmul_rate(precision)
    rows: dict[str, dict] = {}
    entry = {
        "size": name, "precision": precision, "batching": batching, "batch": size.batch,
        "gigaflops": flops / 1e9, "matmul_teraflops": rate / 1e12,
        "threads": THREADS, "providers": rows,
    }  # fmt: skip
    builders = make_providers(precision, batching)
    failures: dict[str, str] = {}
    # interleaved on a CPU, which other jobs share; one after the other on a GPU
    for group in [[label] for label in builders] if ON_GPU else [list(builders)]:
        providers = {label: builders[label](copy.deepcopy(model)) for label in group}
        losses, seconds_of_warm_up, failed = warm_up(providers, images, batches)
        failures |= failed
        for label, rounds in time_rounds(providers, images, batches).items():
            median = statistics.median(rounds)
            rows[label] = {
                "first_loss": losses[label],
                "warm_up_seconds": seconds_of_warm_up[label],
                "ms": 1e3 * median,
                "ms_fastest": 1e3 * min(rounds),
                "images_per_second": size.batch / median,
                "mfu": flops / median / rate,
                "peak_gib": peak_memory(providers[label], images, batches[0]),
            }
            if "compiled" not in label:
                rows[label]["phases"] = time_phases(providers[label], images, batches[0])
        stock = [row["ms"] for label, row in rows.items() if label.startswith("best stock")]
        for row in rows.values():
            row["speed_over_best_stock"] = min(stock) / row["ms"] if stock else None
        if rows:
            save_step(device_name(DEVICE), entry)
        del providers
        give_memory_back()
    show(entry)
    assert rows and not failures, failures
    first = next(iter(rows.values()))["first_loss"]
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    for label, row in rows.items():
        difference = abs(row["first_loss"] - first)
        assert difference <= tolerance, f"{label}: {row['first_loss']}, ours {first}"
    return rows


def warm_up(
    providers: dict[str, Provider], images, batches
) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    """Losses of the first steps, seconds until the provider is warm, errors of those that fail.

    Those are taken out of `providers`: a run on a borrowed machine keeps what the others measure.
    """
    losses, seconds, failures = {}, {}, {}
    for label, step in list(providers.items()):
        start = time.perf_counter()
        try:
            losses[label] = float(step(images, batches[0]))
            for masks in batches * 3:
                step(images, masks)
            synchronize()
        except Exception as error:
            failures[label] = f"{type(error).__name__}: {error}"
            print(f"\n  left out: {label}: {failures[label][:600]}", flush=True)
            del providers[label]
        seconds[label] = time.perf_counter() - start
    return losses, seconds, failures


def give_memory_back() -> None:
    """Models, graphs and optimisers of gigabytes, which reference cycles would keep."""
    gc.collect()
    if ON_GPU:
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def show(entry: dict) -> None:
    """Print one table."""
    print(
        f"\n{entry['size']} batch {entry['batch']} {entry['precision']} {entry['batching']}:"
        f" {entry['gigaflops']:.1f} GFLOP, matmul {entry['matmul_teraflops']:.3f} TFLOP/s"
    )
    for label, row in entry["providers"].items():
        ratio = row["speed_over_best_stock"]
        print(
            f"  {label:56} {row['ms']:9.1f} ms {row['images_per_second']:8.1f} img/s"
            f" {100 * row['mfu']:5.1f} % MFU"
            + (f" {ratio:5.2f}x best stock" if ratio else "")
            + "".join(f"  {p} {ms:.0f}" for p, ms in row.get("phases", {}).items())
        )
