"""Gradients of a single process, and what every way to share a model among ranks offers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Alone:
    """One process that holds everything.

    Attributes:
        loss: (images, masks, denominator) -> 0-d loss of a micro-batch.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor]):
        self._model, self.loss = model, loss

    def micro_batch(
        self, number: int, count: int
    ) -> contextlib.AbstractContextManager[None]:
        """Around the forward and backward pass of micro-batch `number` of `count`, from 0."""
        if number == 0 and count > 1:
            self._sum_in_float32()
        return contextlib.nullcontext()

    def finish(self) -> None:
        """After the last one: every `.grad` is the sum over the micro-batches of all ranks."""

    def _sum_in_float32(self) -> None:
        """Bfloat16 weights get float32 gradients, so that micro-batches add up without rounding."""
        for parameter in self._model.parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                parameter.grad_dtype = torch.float32
