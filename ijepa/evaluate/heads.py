"""A grid of linear heads on frozen features, all trained at once (paper appendix A.2).

The grid is {last block, last 4 blocks} x {BatchNorm, none} x learning rate x weight decay; of an
encoder, one pass serves all heads, and the best is reported.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa.evaluate.features import LAYERS, Layers
from ijepa.evaluate.head_optimizer import HeadOptimizer, HeadParameter

_BATCH_NORM_EPS, _BATCH_NORM_MOMENTUM = 1e-5, 0.1
_INIT_STD = 0.01


@dataclass(frozen=True)
class Head:
    """One head of the grid: what it sees and how it is trained."""

    layers: Layers
    batch_norm: bool
    lr: float
    weight_decay: float

    def __str__(self) -> str:
        norm = "BatchNorm" if self.batch_norm else "plain"
        return f"{self.layers}, {norm}, lr {self.lr:g}, decay {self.weight_decay:g}"


class HeadGrid:
    """Heads of every combination.

    Args:
        width: D of the last block.
        blocks: that are concatenated in "last4" features, 4 where there are as many.
        classes: C.
        lrs, weight_decays: of the grid.
        optimizer: "lars" or "sgd" with Nesterov's momentum.
        seed: of the initial weights, normal with std .01; biases are 0.

    Attributes:
        heads: in the order of `accuracies`.
    """

    def __init__(
        self,
        width: int,
        blocks: int,
        classes: int,
        *,
        lrs: Sequence[float],
        weight_decays: Sequence[float],
        optimizer: Literal["lars", "sgd"],
        momentum: float = 0.9,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ):
        generator = torch.Generator().manual_seed(seed)
        settings = list(itertools.product(lrs, weight_decays))
        if not settings:
            raise ValueError("a grid needs at least one learning rate and one weight decay")
        self.heads: list[Head] = []
        self._groups: list[_Group] = []
        for layers, batch_norm in itertools.product(LAYERS, (True, False)):
            self.heads += [Head(layers, batch_norm, lr, decay) for lr, decay in settings]
            seen = width if layers == "last" else blocks * width
            self._groups.append(_Group(seen, len(settings), classes, batch_norm, generator, device))
        lr, decay = (
            torch.tensor(column, dtype=torch.float64, device=device)
            for column in zip(*settings, strict=True)
        )
        self._optimizers = [
            HeadOptimizer(group.parameters, lr, decay, kind=optimizer, momentum=momentum)
            for group in self._groups
        ]

    def train(self, features: Tensor, labels: Tensor, factor: float) -> Tensor:
        """One update of every head; returns each one's loss before it (heads,).

        Args:
            features: (b, blocks * D) of the last blocks, the last one's at the end.
            labels: (b,) int64.
            factor: of every head's learning rate, as the schedule has it.
        """
        with torch.enable_grad():
            losses = [
                F.cross_entropy(logits.permute(1, 2, 0), labels.expand(len(logits[0]), -1),
                                reduction="none").mean(dim=1)
                for logits in self._logits(features, training=True)
            ]  # fmt: skip
            total = torch.cat(losses)
            for optimizer in self._optimizers:
                optimizer.zero_grad()
            total.sum().backward()
        for optimizer in self._optimizers:
            optimizer.step(factor)
        return total.detach()

    @torch.no_grad()
    def correct(self, features: Tensor, labels: Tensor) -> Tensor:
        """(heads,) how many of b rows each head gets right."""
        return torch.cat([
            (logits.argmax(dim=2) == labels[:, None]).sum(dim=0)
            for logits in self._logits(features, training=False)
        ])  # fmt: skip

    def _logits(self, features: Tensor, training: bool) -> list[Tensor]:
        """Of each group (b, G, C)."""
        return [
            group.logits(features[:, features.shape[1] - group.width :], training)
            for group in self._groups
        ]


class _Group:
    """G heads that see the same features: one product serves them all."""

    def __init__(
        self,
        width: int,
        heads: int,
        classes: int,
        batch_norm: bool,
        generator: torch.Generator,
        device: str | torch.device,
    ):
        self.width, self.heads, self.classes = width, heads, classes
        weight = torch.empty(heads, classes, width)
        weight.normal_(std=_INIT_STD, generator=generator)
        self.weight = weight.to(device).requires_grad_()
        self.bias = torch.zeros(heads, classes, device=device, requires_grad=True)
        self.parameters = [HeadParameter(self.weight, True), HeadParameter(self.bias, False)]
        self.batch_norm = batch_norm
        if batch_norm:
            self.scale = torch.ones(heads, width, device=device, requires_grad=True)
            self.shift = torch.zeros(heads, width, device=device, requires_grad=True)
            # Of the features alone, and so the same for all heads of the group.
            self.mean = torch.zeros(width, device=device)
            self.variance = torch.ones(width, device=device)
            self.parameters += [HeadParameter(self.scale, False), HeadParameter(self.shift, False)]

    def logits(self, features: Tensor, training: bool) -> Tensor:
        """(b, D) -> (b, G, C)."""
        weight, bias = self.weight, self.bias
        if self.batch_norm:
            # As (b, D, 1): one row alone is no batch to take statistics of, and is refused.
            features = F.batch_norm(
                features, self.mean, self.variance, training=training,
                momentum=_BATCH_NORM_MOMENTUM, eps=_BATCH_NORM_EPS,
            )  # fmt: skip
            # (scale x + shift) W' + b = x (scale W)' + (W shift + b)
            bias = bias + (weight @ self.shift[:, :, None])[:, :, 0]
            weight = weight * self.scale[:, None]
        product = features @ weight.reshape(-1, self.width).T  # (b, G * C)
        return product.view(-1, self.heads, self.classes) + bias
