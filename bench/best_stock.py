"""The fastest step that PyTorch's own parts make on dense, truncated batches.

SDPA, torch.compile of the three networks, fused AdamW, foreach lerp, nothing read by the host.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from released_style import (
    LR,
    MOMENTUM,
    WEIGHT_DECAY,
    Clock,
    encode,
    no_clock,
    normalised,
    predict,
    target_features,
)
from torch import Tensor

from ijepa import IJEPA, MaskBatch
from ijepa.optim import ema_pairs, parameter_groups


def _normalised_target(model: IJEPA, images: Tensor, targets: Tensor) -> Tensor:
    images = normalised(images, model)
    return target_features(model, images, targets, F.scaled_dot_product_attention)


def _context(model: IJEPA, images: Tensor, ids: Tensor) -> Tensor:
    images = normalised(images, model)
    return encode(model.context_encoder, images, ids, F.scaled_dot_product_attention)


def _loss(model: IJEPA, context: Tensor, ids: Tensor, targets: Tensor, expected: Tensor) -> Tensor:
    predictions = predict(model, context, ids, targets, F.scaled_dot_product_attention)
    return F.smooth_l1_loss(predictions.float(), expected.float())


class StockUpdate:
    """PyTorch's fused AdamW, then the target encoder's average as one foreach lerp."""

    def __init__(self, model: IJEPA):
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model), lr=LR, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.averages, self.sources = map(list, zip(*ema_pairs(model), strict=True))

    def __call__(self, clock: Clock = no_clock) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        clock("optimizer")
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.sources, 1.0 - MOMENTUM)
        clock("average")


class BestStock:
    """One optimiser step a call.

    Args:
        compile: trace the three networks, each once.
    """

    def __init__(self, model: IJEPA, precision: str, *, compile: bool):
        self.model, self.autocast = model, precision == "bf16"
        self.update = StockUpdate(model)
        wrap = functools.partial(torch.compile, fullgraph=True) if compile else lambda f: f
        self.target, self.context, self.loss = map(wrap, (_normalised_target, _context, _loss))

    def __call__(self, images: Tensor, masks: MaskBatch, clock: Clock = no_clock) -> Tensor:
        model, batch = self.model, masks.batch_size
        ids, targets = (
            masks.context.view(batch, -1),
            masks.targets.view(batch, masks.num_targets, -1),
        )
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.autocast):
            expected = self.target(model, images, targets)
            clock("target")
            context = self.context(model, images, ids)
            clock("context")
            loss = self.loss(model, context, ids, targets, expected)
            clock("predictor")
        loss.backward()
        clock("backward")
        self.update(clock)
        return loss.detach()
