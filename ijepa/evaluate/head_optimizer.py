"""LARS and SGD for many heads at once: every parameter has the heads as its first dimension.

With learning rate lr and weight decay wd of a head, its parameter p and the gradient g:

    d = g + wd p                    neither of biases and norms: d = g
    d = d * eta |p| / |d|           LARS alone, of weights; 1 where either norm is 0
    v = momentum v + d
    p = p - lr v                    Nesterov: p - lr (d + momentum v)

The scaling stays where wd = 0 (You et al., 2017, as VISSL applies it; timm's Lars skips it there).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

TRUST = 1e-3  # eta


@dataclass(frozen=True)
class HeadParameter:
    """A parameter (G, ...) of G heads; `is_weight`: decayed, and scaled by LARS."""

    value: Tensor
    is_weight: bool


class HeadOptimizer:
    """Updates the parameters of G heads, each with settings of its own.

    Args:
        parameters: leaves with gradients.
        lr, weight_decay: (G,) of the heads.
        kind: "lars", or "sgd" with Nesterov's momentum.
        momentum: of both.
    """

    def __init__(
        self,
        parameters: Sequence[HeadParameter],
        lr: Tensor,
        weight_decay: Tensor,
        *,
        kind: Literal["lars", "sgd"],
        momentum: float = 0.9,
    ):
        if kind not in ("lars", "sgd"):
            raise ValueError(f"kind must be 'lars' or 'sgd', got {kind!r}")
        self._parameters = list(parameters)
        self._lr, self._weight_decay = lr, weight_decay
        self._kind, self._momentum = kind, momentum
        self._velocity = [torch.zeros_like(p.value) for p in self._parameters]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self._parameters:
            parameter.value.grad = None

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update, with `factor` times each head's learning rate."""
        for parameter, velocity in zip(self._parameters, self._velocity, strict=True):
            value, gradient = parameter.value, parameter.value.grad
            if gradient is None:
                continue
            change = gradient
            if parameter.is_weight:
                change = gradient + _each(self._weight_decay, value) * value
                if self._kind == "lars":
                    change = change * _each(_trust_ratio(value, change), value)
            velocity.mul_(self._momentum).add_(change)
            update = velocity
            if self._kind == "sgd":
                update = change + self._momentum * velocity
            value.sub_(_each(factor * self._lr, value) * update)


def _trust_ratio(value: Tensor, change: Tensor) -> Tensor:
    """(G,) eta |p| / |d| of each head."""
    weight_norm, change_norm = value.flatten(1).norm(dim=1), change.flatten(1).norm(dim=1)
    known = (weight_norm > 0) & (change_norm > 0)
    return torch.where(known, TRUST * weight_norm / change_norm, 1.0)


def _each(values: Tensor, like: Tensor) -> Tensor:
    """(G,) to (G, 1, ...) of the same number of dimensions."""
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))
