"""How the kernel benches time: every provider in turn, cold caches, medians, one table, one file.

Our own provider comes first. One that computes something else than ours is timed and filed with its
error, and fails the bench after that: a run on a borrowed machine keeps what it measured.

A provider is a function of one set of inputs that returns a callable without arguments. Each is
given several sets in rotation, so that nothing of the last round is in the L2 cache. On a GPU one
round is a CUDA-graph replay of at least twenty calls, issued while the device sleeps, so that no
launch is timed; a provider that cannot be captured is timed with events and marked "eager", its
host time included. On a CPU a round is one call on one thread, timed by the process's clock. Rounds
are interleaved, so that other load falls on every provider alike.
"""

from __future__ import annotations

import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from bench.filing import save_table

Provider = Callable[[dict], Callable[[], object]]

ROUNDS = {
    device: int(os.environ.get("BENCH_ROUNDS", rounds))
    for device, rounds in (("cpu", 11), ("cuda", 20))
}
CALLS_A_GRAPH = 20
SLEEP_CYCLES = 400_000  # about 0.2 ms, longer than a graph's launch takes the host
TOLERANCE = 2e-2  # of a result's error, relative to its largest value
L2_BYTES = 128 * 2**20  # more than any of today's: one rotation touches at least this much


def devices() -> list[str]:
    """Where a bench runs: the GPU if there is one, else the CPU."""
    return ["cuda"] if torch.cuda.is_available() else ["cpu"]


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes a second of a large copy on the device, read plus write: the ceiling of the table."""
    size = (1 if device == "cuda" else 2**-4) * 2**30
    source = torch.empty(int(size), dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    seconds = rounds_of({"copy": [lambda: target.copy_(source)]}, device)["copy"]
    return 2 * source.numel() / statistics.median(seconds)


def backward_of(
    function: Callable[..., Tensor], inputs: list[Tensor]
) -> Callable[[], tuple[Tensor, ...]]:
    """A provider's callable for the gradients of `function(*inputs)` alone.

    The upstream gradient is random, since a constant one can cancel, and the same for every
    provider. Its generator is not the device's own, which a capture must not touch.
    """
    out = function(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    generator = torch.Generator(out.device).manual_seed(out.numel())
    upstream = torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)
    return lambda: torch.autograd.grad(out, wanted, upstream, retain_graph=True)


def compare(
    title: str,
    providers: dict[str, Provider],
    make_inputs: Callable[[], dict],
    ideal_bytes: int,
    device: str,
    *,
    facts: dict | None = None,
    uncapturable: Collection[str] = (),
) -> dict[str, dict]:
    """Check the providers against the first one, time them, print and file the table.

    Args:
        make_inputs: a fresh set of inputs; every provider gets the same sets.
        ideal_bytes: what the op has to read and write at the least, once.
        facts: what the table is about, filed with it.
        uncapturable: providers that wait for the device, known beforehand: what fails in the middle
            of a capture can leave the allocator in it.

    Raises:
        AssertionError: a provider differs from the first one. The table has been filed.
    """
    rotations = max(2, min(8, -(-L2_BYTES // ideal_bytes))) if device == "cuda" else 2
    stream = torch.cuda.Stream() if device == "cuda" else None
    repeats = -(-CALLS_A_GRAPH // rotations)
    if stream:
        stream.wait_stream(torch.cuda.current_stream())  # the providers' own tensors are made there
    else:
        torch.set_num_threads(1)
    with torch.cuda.stream(stream) if stream else torch.enable_grad():
        sets = [make_inputs() for _ in range(rotations)]
        calls = {name: [provider(s) for s in sets] for name, provider in providers.items()}
        results = {name: functions[0]() for name, functions in calls.items()}
        first = next(iter(results))
        errors = {name: _error(found, results[first]) for name, found in results.items()}
        del results
        captured, eager = {}, set()
        for name, functions in calls.items():
            graph = None
            if stream and name not in uncapturable:
                graph = graph_of(functions * repeats, stream)
            captured[name] = [graph.replay] if graph else functions
            if stream and graph is None:
                eager.add(name)
        seconds = rounds_of(captured, device)
        bandwidth = copy_bandwidth(device)

    rows = {}
    for name, rounds in seconds.items():
        calls_a_round = rotations * (1 if name in eager else repeats) if stream else 1
        per_call = [s / calls_a_round for s in rounds]
        median = statistics.median(per_call)
        rows[name] = {
            "us": 1e6 * median,
            "us_p20": 1e6 * _percentile(per_call, 0.2),
            "us_p80": 1e6 * _percentile(per_call, 0.8),
            "gigabytes_per_second": ideal_bytes / median / 1e9,
            "share_of_copy": ideal_bytes / median / bandwidth,
            "eager": name in eager,
            "error": errors[name],
            "same": errors[name] <= TOLERANCE,
        }
    print(f"\n{title}: {ideal_bytes / 1e6:.1f} MB at the least, copy {bandwidth / 1e9:.0f} GB/s")
    for name, row in rows.items():
        row["ratio"] = row["us"] / rows[first]["us"]
        print(
            f"  {name:34} {row['us']:10.1f} us {row['gigabytes_per_second']:8.1f} GB/s"
            f" {100 * row['share_of_copy']:5.1f} % of copy {row['ratio']:6.2f}x"
            f"{'  (events, host time included)' if row['eager'] else ''}"
            f"{'' if row['same'] else '  DIFFERS'}"
        )
    save_table(title, device, rows, copy_gigabytes_per_second=bandwidth / 1e9, **(facts or {}))
    others = {name: errors[name] for name in rows if not rows[name]["same"]}
    assert not others, f"{title}: not what {first} computes: {others}"
    return rows


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[round(share * (len(values) - 1))]


def _error(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest value of each tensor.

    Several tensors where one is expected are the parts along its dimension 1 (q, k, v of qkv).
    """
    found, expected = ([x] if isinstance(x, Tensor) else list(x) for x in (found, expected))
    if len(found) > len(expected) == 1:
        found = [torch.stack(found, dim=1)]
    largest = 0.0
    for a, b in zip(found, expected, strict=True):
        reach = b.abs().max().item() or 1.0
        error = (a.float().reshape(b.shape) - b.float()).abs().max().item() / reach
        largest = error if math.isnan(error) else max(largest, error)
    return largest


def graph_of(functions: list[Callable], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph | None:
    """All functions as one CUDA graph, or None where they cannot be captured."""
    for _ in range(3):
        for function in functions:
            function()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for function in functions:
                function()
    except Exception as error:  # whatever a peer may raise: it is timed without a graph then
        print(f"  not captured: {str(error).splitlines()[:1]}")
        torch.cuda.synchronize()
        return None
    return graph


def rounds_of(functions: dict[str, list[Callable]], device: str) -> dict[str, list[float]]:
    """Seconds of every round of every provider, interleaved; the first two rounds are dropped.

    A provider with several callables takes them in turn on the CPU, and all of them in a GPU round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(ROUNDS[device] + 2):
        for name, callables in functions.items():
            if device == "cpu":
                start = time.process_time()
                callables[number % len(callables)]()
                seconds[name].append(time.process_time() - start)
                continue
            seconds[name].append(device_seconds(callables))
    return {name: rounds[2:] for name, rounds in seconds.items()}


def device_seconds(functions: list[Callable]) -> float:
    """Seconds from the first to the last of what the functions launch, by the device's clock.

    The device sleeps while the host issues the first launches, which would else be timed as well.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP_CYCLES)
    start.record()
    for function in functions:
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
