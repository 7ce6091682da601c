"""The fastest step that PyTorch's own parts make on dense, truncated batches.

SDPA, torch.compile of the three networks or of their blocks, fused AdamW, foreach lerp, nothing
read by the host, and the whole step as one CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.step.released_style import (
    LR,
    MOMENTUM,
    WEIGHT_DECAY,
    Clock,
    encode,
    no_clock,
    normalised,
    predict,
    run_block,
    target_features,
)
from ijepa import IJEPA, MaskBatch
from ijepa.train.cuda_graph import CapturedStep
from ijepa.train.optim import ema_pairs, parameter_groups
from ijepa.vit import Block


def _sdpa_block(block: Block, x: Tensor) -> Tensor:
    return run_block(block, x, F.scaled_dot_product_attention)


RunBlock = Callable[[Block, Tensor], Tensor]


def _target(model: IJEPA, images: Tensor, targets: Tensor, run: RunBlock) -> Tensor:
    return target_features(model, normalised(images, model), targets, run)


def _context(model: IJEPA, images: Tensor, ids: Tensor, run: RunBlock) -> Tensor:
    return encode(model.context_encoder, normalised(images, model), ids, run)


def _loss(
    model: IJEPA, context: Tensor, ids: Tensor, targets: Tensor, expected: Tensor, run: RunBlock
) -> Tensor:
    predictions = predict(model, context, ids, targets, run)
    return F.smooth_l1_loss(predictions.float(), expected.float())


class StockUpdate:
    """PyTorch's fused AdamW, then the target encoder's average as one foreach lerp."""

    def __init__(self, model: IJEPA):
        on_gpu = next(model.parameters()).is_cuda
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model), lr=LR, weight_decay=WEIGHT_DECAY, fused=True,
            capturable=on_gpu,
        )  # fmt: skip
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
        compile: True traces the three networks, each once; "blocks" their blocks.
        cuda_graph: replay the whole step.
    """

    def __init__(self, model: IJEPA, precision: str, *, compile=False, cuda_graph: bool = False):
        self.model, self.autocast = model, precision == "bf16"
        self.update = StockUpdate(model)
        trace = functools.partial(torch.compile, fullgraph=True, dynamic=False)
        run = trace(_sdpa_block) if compile == "blocks" else _sdpa_block
        wrap = trace if compile is True else lambda function: function
        self.target, self.context, self.loss = (
            functools.partial(wrap(function), run=run) for function in (_target, _context, _loss)
        )
        self.replayed = CapturedStep(self._step, lambda: None) if cuda_graph else None

    def __call__(self, images: Tensor, masks: MaskBatch, clock: Clock = no_clock) -> Tensor:
        if self.replayed is not None and clock is no_clock:
            return self.replayed(images, masks)
        return self._step(images, masks, clock)

    def _step(self, images: Tensor, masks: MaskBatch, clock: Clock = no_clock) -> Tensor:
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
