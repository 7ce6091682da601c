"""The optimiser step, moving average and weight casts: one pass against PyTorch's own.

    pytest bench/ops/bench_adamw_ema.py -s

Parameter lists of ViT-B/16, L/16 and H/14 with their predictors; the encoder's parameters have an
EMA partner. Every provider ends with float32 weights, moments and averages and with fresh bfloat16
copies of both networks' weights. Gradients are bfloat16 (what bfloat16 weights produce) or float32
(what accumulation keeps); the stock providers first cast bfloat16 gradients up, as autocast does.

Rounds are interleaved, so that load on the machine falls on every provider alike; a ratio is the
median of the rounds' ratios. On a GPU a round is a CUDA-graph replay where the
provider can be captured. The CPU, where two threads are used, runs ViT-B alone.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from masked_vit_kernels import AdamWEMA
from masked_vit_kernels.optimizer import cpu as adamw_ema_cpu
from masked_vit_kernels.optimizer.slots import GroupValues
from torch import Tensor, nn

from bench.filing import save_table
from bench.timing import copy_bandwidth, device_seconds

MODELS = {  # width, depth, patch, positions, predictor depth
    "B": (768, 12, 16, 196, 6),
    "L": (1024, 24, 16, 196, 12),
    "H": (1280, 32, 14, 256, 12),
}
PREDICTOR_WIDTH = 384
LR, DECAY, MOMENTUM = 1e-4, 0.05, 0.996
ROUNDS = {
    device: int(os.environ.get("BENCH_ROUNDS", rounds))
    for device, rounds in (("cpu", 15), ("cuda", 25))
}

# Bytes a parameter with and without an EMA partner, gradient norm left out (performance figures of
# the design: p, m, v read and written 24, the average 8, two bfloat16 copies 4, the gradient).
ONE_PASS_BYTES = {torch.bfloat16: (38, 28), torch.float32: (40, 30)}
FUSED_BYTES = {torch.bfloat16: (58, 40), torch.float32: (52, 34)}

# What the byte ratio promises, and the share of it that the CPU must reach.
PROMISED_RATIO = {torch.float32: 1.30, torch.bfloat16: 1.53}
CPU_SHARE = 0.9


def block_shapes(width: int, depth: int) -> list[tuple[int, ...]]:
    block = [
        (width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,),
        (width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,),
    ]  # fmt: skip
    return block * depth + [(width,), (width,)]


def encoder_shapes(model: str) -> list[tuple[int, ...]]:
    width, depth, patch, positions, _ = MODELS[model]
    embedding = [(width, 3, patch, patch), (width,), (1, positions, width)]
    return embedding + block_shapes(width, depth)


def predictor_shapes(model: str) -> list[tuple[int, ...]]:
    width, _, _, positions, depth = MODELS[model]
    p = PREDICTOR_WIDTH
    ends = [(p, width), (p,), (width, p), (width,), (1, 1, p), (1, positions, p)]
    return ends + block_shapes(p, depth)


def filled(shapes, device, dtype=torch.float32) -> list[Tensor]:
    generator = torch.Generator(device=device).manual_seed(len(shapes))
    return [torch.randn(s, device=device, generator=generator).mul_(0.02).to(dtype) for s in shapes]


class OnePass:
    """AdamWEMA on bfloat16 weights with float32 masters."""

    def __init__(self, model: str, device: str, gradient_dtype: torch.dtype):
        encoder, predictor = encoder_shapes(model), predictor_shapes(model)
        weights = filled(encoder + predictor, device, torch.bfloat16)
        self.parameters = [nn.Parameter(w) for w in weights]
        for p, g in zip(
            self.parameters, filled(encoder + predictor, device, gradient_dtype), strict=True
        ):
            p.grad_dtype = gradient_dtype
            p.grad = g
        targets = [p.detach().clone() for p in self.parameters[: len(encoder)]]
        self.optimizer = AdamWEMA(
            self.parameters,
            lr=LR,
            weight_decay=DECAY,
            ema=list(zip(targets, self.parameters, strict=False)),
            momentum=MOMENTUM,
        )
        self.optimizer.step()

    def with_norm(self) -> None:
        self.optimizer.step()

    @torch.no_grad()
    def update_alone(self) -> None:
        """The CPU update without the gradient norm."""
        plan = self.optimizer._current_plan()
        gradients = [slot.gradient() for slot in plan.slots]
        adamw_ema_cpu.step_on_cpu(
            plan.slots,
            gradients,
            plan.step_views,
            [GroupValues(LR, 0.9, 0.999, 1e-8, DECAY)],
            grad_norm=0.0,
            max_grad_norm=None,
            momentum=MOMENTUM,
            compiled=True,
        )


class Stock:
    """torch.optim.AdamW, foreach lerp and foreach casts into bfloat16 copies that exist."""

    def __init__(self, model: str, device: str, gradient_dtype: torch.dtype, implementation: str):
        encoder, predictor = encoder_shapes(model), predictor_shapes(model)
        self.parameters = [nn.Parameter(w) for w in filled(encoder + predictor, device)]
        self.gradients = filled(encoder + predictor, device, gradient_dtype)
        self.casts_gradients = gradient_dtype != torch.float32
        for p, g in zip(self.parameters, self.gradients, strict=True):
            p.grad = g.float() if self.casts_gradients else g
        self.sources = [p.detach() for p in self.parameters[: len(encoder)]]
        self.targets = [p.clone() for p in self.sources]
        self.weight_copies = [p.detach().bfloat16() for p in self.parameters]
        self.target_copies = [t.bfloat16() for t in self.targets]
        self.implementation = implementation
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=LR,
            weight_decay=DECAY,
            fused=implementation == "fused",
            foreach=implementation == "foreach",
            capturable=device == "cuda",
        )
        self.update_alone()

    @torch.no_grad()
    def update_alone(self) -> None:
        if self.casts_gradients:
            torch._foreach_copy_(self._own_gradients(), self.gradients)
        self.optimizer.step()
        if self.implementation == "loop":  # as the released code: mul_ and add_ a tensor
            for source, target in zip(self.sources, self.targets, strict=True):
                target.mul_(MOMENTUM).add_((1.0 - MOMENTUM) * source)
        else:
            torch._foreach_lerp_(self.targets, self.sources, 1.0 - MOMENTUM)
        torch._foreach_copy_(self.weight_copies, [p.detach() for p in self.parameters])
        torch._foreach_copy_(self.target_copies, self.targets)

    def with_norm(self) -> None:
        nn.utils.get_total_norm(self._own_gradients())
        self.update_alone()

    def _own_gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]


def timed(function: Callable[[], None], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    return device_seconds([function])


def captured(function: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph's replay of `function`, which has run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def interleaved(functions: dict[str, Callable[[], None]], device: str) -> dict[str, list[float]]:
    """Seconds of every round of every function; one round of warm-up is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS[device] + 1):
        for name, function in functions.items():
            seconds[name].append(timed(function, device))
    return {name: rounds[1:] for name, rounds in seconds.items()}


def model_bytes(model: str, per_parameter: tuple[int, int], norm_bytes: int = 0) -> int:
    """Of a step; `norm_bytes` are those that the gradient norm reads of every parameter."""
    with_partner = sum(torch.Size(s).numel() for s in encoder_shapes(model))
    without = sum(torch.Size(s).numel() for s in predictor_shapes(model))
    of_update = with_partner * per_parameter[0] + without * per_parameter[1]
    return of_update + (with_partner + without) * norm_bytes


def report(title: str, seconds: dict[str, list[float]], bytes_of: dict[str, int]) -> dict:
    """Print one line a provider and return the same for the results file."""
    print(f"\n{title}")
    rows = {}
    for name, rounds in seconds.items():
        median = statistics.median(rounds)
        ratios = [ours / one for ours, one in zip(rounds, seconds["one pass"], strict=True)]
        rows[name] = {
            "us": 1e6 * median,
            "us_fastest": 1e6 * min(rounds),
            "times_one_pass": statistics.median(ratios),
        }
        bandwidth = ""
        if name in bytes_of:
            rows[name]["gigabytes_per_second"] = bytes_of[name] / median / 1e9
            rows[name]["bytes_moved"] = bytes_of[name]
            bandwidth = f"{rows[name]['gigabytes_per_second']:8.1f} GB/s"
        print(
            f"  {name:12} {1e6 * median:10.0f} us (fastest {1e6 * min(rounds):10.0f}) "
            f"{rows[name]['times_one_pass']:5.2f}x {bandwidth}"
        )
    return rows


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpu_update_against_fused_adamw(gradient_dtype):
    """ViT-B on two threads, the update without and with the gradient norm on both sides."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        one_pass = OnePass("B", "cpu", gradient_dtype)
        fused = Stock("B", "cpu", gradient_dtype, "fused")
        one_pass.update_alone()
        bytes_of = {
            "one pass": model_bytes("B", ONE_PASS_BYTES[gradient_dtype]),
            "fused": model_bytes("B", FUSED_BYTES[gradient_dtype]),
        }
        rows = {}
        for part in ("update_alone", "with_norm"):
            functions = {"one pass": getattr(one_pass, part), "fused": getattr(fused, part)}
            title = f"ViT-B, CPU, {gradient_dtype} gradients, {part}"
            seconds = interleaved(functions, "cpu")
            rows[part] = report(title, seconds, bytes_of if part == "update_alone" else {})
            save_table(title, "cpu", rows[part])
    finally:
        torch.set_num_threads(threads)
    required = CPU_SHARE * PROMISED_RATIO[gradient_dtype]
    assert rows["update_alone"]["fused"]["times_one_pass"] >= required


@pytest.mark.parametrize("implementation", ["foreach", "loop"])
def test_cpu_update_against_slower_stock(implementation):
    one_pass = OnePass("B", "cpu", torch.bfloat16)
    stock = Stock("B", "cpu", torch.bfloat16, implementation)
    functions = {"one pass": one_pass.with_norm, implementation: stock.with_norm}
    title = f"ViT-B, CPU, bfloat16 gradients, with_norm, {implementation}"
    save_table(title, "cpu", report(title, interleaved(functions, "cpu"), {}))


def save_on_gpu(title: str, rows: dict, **facts: object) -> None:
    bandwidth = copy_bandwidth("cuda") / 1e9
    save_table(title, "cuda", rows, copy_gigabytes_per_second=bandwidth, **facts)


@pytest.mark.gpu
@pytest.mark.parametrize("gradient_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("model", list(MODELS)[::-1])  # the largest counts most
def test_gpu_step(model, gradient_dtype):
    """The whole step with the gradient norm, every provider captured in a CUDA graph."""
    one_pass = OnePass(model, "cuda", gradient_dtype)
    functions = {"one pass": captured(one_pass.with_norm)}
    one_pass.optimizer.upload_hyper_parameters()
    providers = {name: Stock(model, "cuda", gradient_dtype, name) for name in ("fused", "loop")}
    functions |= {name: captured(stock.with_norm) for name, stock in providers.items()}
    bytes_of = {
        "one pass": model_bytes(model, ONE_PASS_BYTES[gradient_dtype], gradient_dtype.itemsize),
        "fused": model_bytes(model, FUSED_BYTES[gradient_dtype], norm_bytes=4),
    }
    title = f"ViT-{model}, {gradient_dtype} gradients, with norm"
    rows = report(title, interleaved(functions, "cuda"), bytes_of)
    gradients = str(gradient_dtype).removeprefix("torch.")
    save_on_gpu(title, rows, op="optimizer", model=model, gradients=gradients)


@pytest.mark.gpu
@pytest.mark.parametrize("model", list(MODELS)[::-1])  # the largest counts most
def test_gpu_moving_average_alone(model):
    """`ema_update_` against `_foreach_lerp_`, both captured."""
    from masked_vit_kernels import ema_update_

    shapes = encoder_shapes(model)
    targets, sources = filled(shapes, "cuda"), filled(shapes, "cuda")
    ema_update_(targets, sources, MOMENTUM)
    functions = {
        "one pass": captured(lambda: ema_update_(targets, sources, MOMENTUM)),
        "foreach lerp": captured(lambda: torch._foreach_lerp_(targets, sources, 1 - MOMENTUM)),
    }
    moved = 12 * sum(t.numel() for t in targets)
    title = f"ViT-{model}, moving average alone"
    rows = report(title, interleaved(functions, "cuda"), dict.fromkeys(functions, moved))
    save_on_gpu(title, rows, op="average", model=model)
