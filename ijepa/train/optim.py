"""The optimiser of a model: released parameter groups, AdamW and the target encoder's average.

`AdamWEMA` does it all in one pass. A non-finite loss or gradient turns its step into nothing by
way of a flag on the device: weights, Adam's state and the target encoder stay bit-equal.
"""

from __future__ import annotations

import torch
from masked_vit_kernels import AdamWEMA, Float8Rows
from torch import Tensor, nn

from ijepa.config import OptimConfig
from ijepa.model import IJEPA
from ijepa.train.schedules import ScheduleValues
from ijepa.vit import Linear


def make_optimizer(model: IJEPA, config: OptimConfig) -> AdamWEMA:
    """AdamW over both trained networks, moving the target encoder along."""
    return AdamWEMA(
        parameter_groups(model),
        betas=config.betas,
        eps=config.eps,
        ema=ema_pairs(model),
        max_grad_norm=config.max_grad_norm,
    )


def parameter_groups(model: IJEPA) -> list[dict]:
    """The released groups: biases and other 1-D parameters are not decayed, all else is.

    `mask_token` has three dimensions and is decayed. The group that is not carries
    `"decayed": False`, so that the schedule leaves its weight decay at zero.
    """
    networks: list[nn.Module] = [model.context_encoder, model.predictor]
    trained = [
        (name, parameter)
        for network in networks
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    ]
    decayed = [p for name, p in trained if p.ndim != 1 and "bias" not in name]
    others = [p for name, p in trained if p.ndim == 1 or "bias" in name]
    return [
        {"params": decayed, "decayed": True},
        {"params": others, "decayed": False, "weight_decay": 0.0},
    ]


def ema_pairs(model: IJEPA) -> list[tuple[Tensor, Tensor]]:
    """(target, source) parameters of the moving average: all that is trained in the encoder."""
    sources = dict(model.context_encoder.named_parameters())
    return [
        (target, sources[name])
        for name, target in model.target_encoder.named_parameters()
        if sources[name].requires_grad
    ]


def apply_schedule(optimizer: AdamWEMA, values: ScheduleValues) -> None:
    """Set what the next step uses."""
    for group in optimizer.param_groups:
        group["lr"] = values.lr
        group["weight_decay"] = values.weight_decay if group["decayed"] else 0.0
    optimizer.momentum = values.momentum


def compute_targets_in_float8(model: IJEPA, optimizer: AdamWEMA) -> None:
    """Give the target encoder's layers float8 copies, which the optimiser keeps from now on.

    Raises:
        ValueError: sizes or a GPU that float8 products do not take.
    """
    layers = [m for m in model.target_encoder.blocks.modules() if isinstance(m, Linear)]
    copies = []
    for layer in layers:
        layer.float8 = Float8Rows.empty_like(layer.weight)
        copies.append((layer.weight, layer.float8))
    optimizer.add_float8_copies(copies)
    model.float8_targets = True


@torch.no_grad()
def optimizer_of_rounded_weights(model: IJEPA, config: OptimConfig) -> AdamWEMA:
    """Turn all that is trained or averaged into bfloat16; the optimiser keeps it in float32.

    Fixed positions stay float32.
    """
    averaged = {id(target) for target, _ in ema_pairs(model)}
    exact = {
        parameter: parameter.detach().clone()
        for parameter in model.parameters()
        if parameter.requires_grad or id(parameter) in averaged
    }
    for parameter, value in exact.items():
        parameter.data = value.bfloat16()
    optimizer = make_optimizer(model, config)
    for parameter, value in exact.items():
        optimizer.master(parameter).copy_(value)
    return optimizer
