"""The loop that the four methods share: optimiser, moving average, a loss curve."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from masked_vit_kernels import AdamWEMA
from torch import Tensor, nn

BARS = "▁▂▃▄▅▆▇█"


def options(description: str | None) -> argparse.Namespace:
    """--steps, --batch, --seed, --device and --out of a script."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32, help="images or clips a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="a .csv for the loss curve")
    return parser.parse_args()


def train(
    given: argparse.Namespace,
    model: nn.Module,
    loss_of: Callable[[torch.Generator], Tensor],
    *,
    teacher: nn.Module | None = None,
    averaged: nn.Module | None = None,
    lr: float = 1e-3,
    momentum: float = 0.99,
) -> list[float]:
    """Minimise `loss_of`, which draws its own batch, over what of `model` has gradients; `teacher`
    averages `averaged`.

    Returns:
        The loss of every step; printed as a curve, and written where --out says.
    """
    generator = torch.Generator().manual_seed(given.seed)
    pairs = () if teacher is None or averaged is None else (teacher, averaged)
    optimizer = AdamWEMA(
        [p for p in model.parameters() if p.requires_grad],
        lr=lr, weight_decay=0.04, max_grad_norm=1.0, ema=pairs, momentum=momentum,
    )  # fmt: skip
    losses, started = [], time.monotonic()
    for step in range(given.steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20)
        loss = loss_of(generator)
        loss.backward()
        optimizer.step(loss=loss.detach())
        optimizer.zero_grad()
        losses.append(float(loss))
        if (step + 1) % max(given.steps // 10, 1) == 0:
            left = (time.monotonic() - started) / (step + 1) * (given.steps - step - 1)
            print(f"step {step + 1}/{given.steps}  loss {losses[-1]:.4f}  {left:.0f} s left")
    print(curve(losses))
    if given.out is not None:
        lines = ["step,loss", *(f"{i},{loss:.6g}" for i, loss in enumerate(losses))]
        given.out.write_text("\n".join(lines) + "\n")
    return losses


def curve(losses: list[float], width: int = 60) -> str:
    """The losses as a line of bars between their least and greatest."""
    size = max(1, len(losses) // width)
    means = [sum(losses[i : i + size]) / size for i in range(0, len(losses) - size + 1, size)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low or 1)
    bars = "".join(BARS[round((mean - low) * scale)] for mean in means)
    return f"{high:.3f} {bars} {low:.3f}"
