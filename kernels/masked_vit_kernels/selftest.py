"""Random shapes for every op, on whatever this machine runs, against the float64 reference.

    python -m masked_vit_kernels.selftest [--seed N] [--rounds 5] [--device cuda]

On a GPU the Triton kernels are checked in every dtype, elsewhere the CPU path in float32 and
bfloat16. The seed is printed; the same seed draws the same shapes and numbers.
"""

from __future__ import annotations

import argparse
import itertools
import math
import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import masked_vit_kernels as ops
from masked_vit_kernels import reference
from masked_vit_kernels.attention.config import MAX_HEAD_DIM
from masked_vit_kernels.catalogue.sizes import HEAD_DIMS
from masked_vit_kernels.tokens.prediction_loss import KINDS, TARGET_NORMS

# Largest error, relative to the largest exact value (at least 1).
TOLERANCE = {torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Machine:
    """Where and in what the ops are checked, and the numbers they are checked with."""

    device: str
    dtype: torch.dtype
    numbers: np.random.Generator

    def randn(self, *shape: int) -> Tensor:
        values = torch.from_numpy(self.numbers.standard_normal(shape, dtype=np.float32))
        return values.to(self.device, self.dtype).requires_grad_()

    def integer(self, low: int, high: int) -> int:
        """Uniform in [low, high]."""
        return int(self.numbers.integers(low, high + 1))

    def lengths(self, count: int, longest: int) -> list[int]:
        return [self.integer(0, longest) for _ in range(count)]

    def ids(self, lengths: list[int], num_tokens: int, capacity: int) -> Tensor:
        """Distinct ids within each sequence, -1 on the padding."""
        draws = [self.numbers.permutation(num_tokens)[:n] for n in lengths]
        tail = np.full(capacity - sum(lengths), -1)
        return torch.from_numpy(np.concatenate([*draws, tail]).astype(np.int64)).to(self.device)


def _compare(machine: Machine, name: str, found: Tensor, exact: Tensor) -> float:
    """The relative error of one result."""
    exact, found = exact.detach().double().cpu(), found.detach().double().cpu()
    if found.shape != exact.shape:
        raise AssertionError(f"{name}: shape {tuple(found.shape)}, expected {tuple(exact.shape)}")
    if not exact.numel():
        return 0.0
    error = float((found - exact).abs().max() / exact.abs().max().clamp(min=1.0))
    if not error <= TOLERANCE[machine.dtype]:  # also where it is NaN
        raise AssertionError(f"{name}: error {error:.3g} over {TOLERANCE[machine.dtype]:.3g}")
    return error


def _check(
    machine: Machine,
    function: Callable[..., Tensor],
    oracle: Callable[..., Tensor],
    inputs: list[Tensor],
) -> float:
    """Output and gradients of `function` on the machine against `oracle` in float64."""
    exact_inputs = [x.detach().cpu().double().requires_grad_() for x in inputs]
    found, exact = function(*inputs), oracle(*exact_inputs)
    upstream = torch.from_numpy(machine.numbers.standard_normal(tuple(exact.shape)))
    worst = _compare(machine, "output", found, exact)
    if not exact.requires_grad:  # nothing but padding
        return worst
    gradients = torch.autograd.grad(found, inputs, upstream.to(found.device, found.dtype))
    rounded = upstream.to(found.dtype).double()
    exact_gradients = torch.autograd.grad(exact, exact_inputs, rounded, materialize_grads=True)
    for number, pair in enumerate(zip(gradients, exact_gradients, strict=True)):
        worst = max(worst, _compare(machine, f"gradient {number}", *pair))
    return worst


def check_attention(machine: Machine) -> float:
    """`varlen_attention_qkvpacked`, and `varlen_attention` with other lengths for the keys, whose
    heads some problems share among all queries."""
    # Every other problem has a head dim of the released models, which have tiles of their own.
    head_dims = HEAD_DIMS if machine.integer(0, 1) else range(8, MAX_HEAD_DIM + 1, 8)
    head_dim = head_dims[machine.integer(0, len(head_dims) - 1)]
    heads = machine.integer(1, 4)
    longest = (64, 128, 256, 400)[machine.integer(0, 3)]
    count = machine.integer(1, 4)
    packings = []
    for _ in range(2):
        lengths = machine.lengths(count, longest)
        packings.append(ops.pack_lengths(lengths, capacity=sum(lengths) + machine.integer(0, 90)))
    own, other = packings
    here = [packing.to(machine.device) for packing in packings]

    def attend(q, k, v):
        return ops.varlen_attention(
            q, k, v, here[0].cu_seqlens, here[1].cu_seqlens, own.max_seqlen, other.max_seqlen,
            packing_q=here[0], packing_k=here[1],
        )  # fmt: skip

    def oracle(q, k, v):
        return reference.varlen_attention(q, k, v, own.cu_seqlens, other.cu_seqlens)[0]

    key_heads = heads if machine.integer(0, 1) else 1
    shapes = ((own.capacity, heads), *[(other.capacity, key_heads)] * 2)
    worst = _check(machine, attend, oracle, [machine.randn(*n, head_dim) for n in shapes])

    def attend_packed(qkv):
        return ops.varlen_attention_qkvpacked(
            qkv, here[0].cu_seqlens, own.max_seqlen, packing=here[0]
        )

    def oracle_packed(qkv):
        q, k, v = qkv.unbind(1)
        return reference.varlen_attention(q, k, v, own.cu_seqlens, own.cu_seqlens)[0]

    qkv = machine.randn(own.capacity, 3, heads, head_dim)
    return max(worst, _check(machine, attend_packed, oracle_packed, [qkv]))


def check_gather_and_scatter(machine: Machine) -> float:
    """Packed gather, and scatter of what it gathered."""
    images, tokens, width = (
        machine.integer(1, 4),
        machine.integer(1, 80),
        8 * machine.integer(1, 40),
    )
    lengths = machine.lengths(images, tokens)
    packing = ops.pack_lengths(lengths, capacity=sum(lengths) + machine.integer(0, 20))
    ids = machine.ids(lengths, tokens, packing.capacity)
    here = packing.to(machine.device)
    worst = _check(
        machine,
        lambda x: ops.gather_tokens(x, ids, here),
        lambda x: reference.gather_tokens(x, ids.cpu(), packing),
        [machine.randn(images, tokens, width)],
    )
    return max(
        worst,
        _check(
            machine,
            lambda x, fill: ops.scatter_tokens(x, ids, fill, tokens, here),
            lambda x, fill: reference.scatter_tokens(x, ids.cpu(), fill, tokens, packing),
            [machine.randn(packing.capacity, width), machine.randn(width)],
        ),
    )


def check_patch_embedding(machine: Machine) -> float:
    """`embed_visible_patches` of float images or clips, and the prefix before their tokens."""
    images, rows, columns = machine.integer(1, 3), machine.integer(1, 5), machine.integer(1, 5)
    channels, patch, width = (
        machine.integer(1, 4),
        2 * machine.integer(1, 8),
        8 * machine.integer(1, 12),
    )
    # An image, or a clip of two tubelets of one or two frames.
    frames = machine.integer(0, 2)
    grid, sides = ((2,), (frames,)) if frames else ((), ())
    grid, sides = (*grid, rows, columns), (*sides, patch, patch)
    num_tokens = math.prod(grid)
    lengths = machine.lengths(images, num_tokens)
    packing = ops.pack_lengths(lengths, capacity=sum(lengths) + 3)
    ids = machine.ids(lengths, num_tokens, packing.capacity)
    here = packing.to(machine.device)
    sizes = [count * side for count, side in zip(grid, sides, strict=True)]
    pixels = machine.randn(images, channels, *sizes).detach()
    weight = machine.randn(width, channels, *sides)
    with torch.no_grad():
        weight *= (channels * math.prod(sides)) ** -0.5
    worst = _check(
        machine,
        lambda w, b, p: ops.embed_visible_patches(pixels, w, b, p, ids, here),
        lambda w, b, p: reference.embed_visible_patches(
            pixels.cpu().double(), w, b, p, ids.cpu(), packing
        ),
        [weight, machine.randn(width), machine.randn(num_tokens, width)],
    )
    extended = ops.pack_prefix(packing, machine.integer(0, 5))
    there = extended.to(machine.device)
    prefix = machine.randn(extended.num_prefix_tokens, width)
    error = _check(
        machine,
        lambda x, prefix: ops.prepend_tokens(x, prefix, there),
        lambda x, prefix: reference.prepend_tokens(x, prefix, extended),
        [machine.randn(packing.capacity, width), prefix],
    )
    return max(worst, error)


def check_predictor_tokens_and_loss(machine: Machine) -> float:
    """`assemble_predictor_tokens`, then `latent_prediction_loss` of every kind."""
    images, blocks, tokens = machine.integer(1, 3), machine.integer(1, 4), machine.integer(2, 40)
    width = 8 * machine.integer(1, 24)
    context_lengths = machine.lengths(images, tokens)
    target_lengths = machine.lengths(images * blocks, tokens)
    context = ops.pack_lengths(context_lengths, capacity=sum(context_lengths) + 5)
    target = ops.pack_lengths(target_lengths, capacity=sum(target_lengths) + 4)
    packing = ops.pack_predictor(context, target)
    context_ids = machine.ids(context_lengths, tokens, context.capacity)
    target_ids = machine.ids(target_lengths, tokens, target.capacity)
    here = packing.to(machine.device)
    worst = _check(
        machine,
        lambda c, m, p: ops.assemble_predictor_tokens(c, m, p, context_ids, target_ids, here),
        lambda c, m, p: reference.assemble_predictor_tokens(
            c, m, p, context_ids.cpu(), target_ids.cpu(), packing
        ),
        [
            machine.randn(context.capacity, width),
            machine.randn(width),
            machine.randn(tokens, width),
        ],
    )
    features = machine.randn(1, tokens, width).detach()
    for kind, norm in itertools.product(KINDS, TARGET_NORMS):
        options = {"kind": kind, "target_norm": norm}
        error = _check(
            machine,
            lambda x, options=options: ops.latent_prediction_loss(
                x, features, target_ids, **options
            ),
            lambda x, options=options: reference.latent_prediction_loss(
                x, features.cpu().double(), target_ids.cpu(), **options
            ),
            [machine.randn(target.capacity, width)],
        )
        worst = max(worst, error)
    return worst


def check_ema(machine: Machine) -> float:
    """`ema_update_` of a few float32 averages."""
    shapes = [(machine.integer(1, 70), machine.integer(1, 70)) for _ in range(3)]
    targets = [machine.randn(*shape).detach().float() for shape in shapes]
    sources = [machine.randn(*shape).detach() for shape in shapes]
    exact = [target.cpu().double() for target in targets]
    reference.ema_update_(exact, [source.cpu() for source in sources], 0.996)
    ops.ema_update_(targets, sources, 0.996)
    return max(_compare(machine, "target", *pair) for pair in zip(targets, exact, strict=True))


def check_adamw(machine: Machine) -> float:
    """Three steps of `AdamWEMA` in float32 against `torch.optim.AdamW` in float64 and an EMA."""
    shapes = [(machine.integer(1, 70), machine.integer(1, 70)) for _ in range(3)]
    machine = Machine(machine.device, torch.float32, machine.numbers)
    parameters = [machine.randn(*shape) for shape in shapes]
    targets = [p.detach().clone() for p in parameters]
    exact = [p.detach().cpu().double().requires_grad_() for p in parameters]
    exact_targets = [t.cpu().double() for t in targets]
    settings: dict[str, Any] = dict(lr=1e-2, weight_decay=0.05, betas=(0.9, 0.95))
    pairs = list(zip(parameters, targets, strict=True))
    optimizer = ops.AdamWEMA(
        [{"params": parameters}], ema=[(t, p) for p, t in pairs], momentum=0.9, **settings
    )
    exact_optimizer = torch.optim.AdamW(exact, **settings)
    for _ in range(3):
        for parameter, twin in zip(parameters, exact, strict=True):
            gradient = machine.randn(*parameter.shape).detach()
            parameter.grad, twin.grad = gradient, gradient.cpu().double()
        optimizer.step()
        exact_optimizer.step()
        reference.ema_update_(exact_targets, [twin.detach() for twin in exact], 0.9)
    found = [*parameters, *targets]
    wanted = [*exact, *exact_targets]
    return max(_compare(machine, "state", *pair) for pair in zip(found, wanted, strict=True))


CHECKS = (
    check_attention,
    check_gather_and_scatter,
    check_patch_embedding,
    check_predictor_tokens_and_loss,
    check_ema,
    check_adamw,
)


def main(arguments: list[str] | None = None) -> int:
    """Check every op with random shapes; return 1 where one is wrong."""
    parser = argparse.ArgumentParser(description="random shapes for every op against float64")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    on_gpu = options.device.startswith("cuda")
    dtypes = (
        (torch.float32, torch.bfloat16, torch.float16)
        if on_gpu
        else (torch.float32, torch.bfloat16)
    )
    where = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{where}, torch {torch.__version__}, seed {options.seed}, {options.rounds} rounds")
    failures = 0
    for number, check in enumerate(CHECKS):
        for dtype in dtypes:
            worst = 0.0
            try:
                for turn in range(options.rounds):
                    numbers = np.random.default_rng([options.seed, number, turn])
                    worst = max(worst, check(Machine(options.device, dtype, numbers)))
                outcome = f"ok, largest error {worst:.1e}"
            except AssertionError as error:
                failures += 1
                outcome = f"WRONG in round {turn}: {error}"
            print(
                f"{check.__name__.removeprefix('check_'):28} {str(dtype)[6:]:9} {outcome}",
                flush=True,
            )
    print("all ops agree with the reference" if not failures else f"{failures} checks failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
