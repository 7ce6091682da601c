"""Our step: the trainer as it is, and the same work phase by phase for the clock."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.step.released_style import LR, MOMENTUM, WEIGHT_DECAY, Clock, no_clock
from ijepa import IJEPA, MaskBatch, OptimConfig, ScheduleConfig, Trainer
from ijepa import model as model_module

SCHEDULE = ScheduleConfig(
    total_steps=10**9, start_lr=LR, peak_lr=LR, final_lr=LR,
    weight_decay=WEIGHT_DECAY, final_weight_decay=WEIGHT_DECAY,
    momentum=MOMENTUM, final_momentum=MOMENTUM,
)  # fmt: skip


def our_phases(
    model: IJEPA, images: Tensor, masks: MaskBatch, autocast: bool, clock: Clock
) -> Tensor:
    """The loss, with the clock told when each network is through."""
    loss_of = model_module.latent_prediction_loss  # whichever stands there now
    with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
        features, rows = model.targets(images, masks)
        clock("target")
        context = model.context_encoder(images, masks.context, masks.context_packing)
        clock("context")
        loss = loss_of(model.predictor(context, masks), features, rows, kind=model.config.loss)
        clock("predictor")
    return loss


class Ours:
    """One optimiser step a call."""

    def __init__(
        self,
        model: IJEPA,
        precision: str,
        *,
        target_precision: str = "same",
        compile=False,
        cuda_graph: bool = False,
    ):
        self.autocast = precision == "bf16"
        self.trainer = Trainer(
            model, OptimConfig(), SCHEDULE, precision=precision,
            target_precision=target_precision, compile=compile, cuda_graph=cuda_graph,
        )  # fmt: skip

    def __call__(self, images: Tensor, masks: MaskBatch, clock: Clock = no_clock) -> Tensor:
        if clock is no_clock:
            return self.trainer.step(images, masks).loss
        optimizer = self.trainer.optimizer
        optimizer.zero_grad(set_to_none=True)
        loss = our_phases(self.trainer.model, images, masks, self.autocast, clock)
        loss.backward()
        clock("backward")
        optimizer.step(loss=loss)
        clock("optimizer")
        clock("average")  # the optimiser's pass has moved it
        return loss.detach()
