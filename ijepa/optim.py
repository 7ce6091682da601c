"""One update of the step: finiteness, clipping, AdamW and the target encoder's moving average.

Nothing here waits for the device. A non-finite loss or gradient turns the update into nothing by
way of a device flag: weights, Adam's state and the target encoder stay bit-equal.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ijepa.config import OptimConfig
from ijepa.model import IJEPA
from ijepa.schedules import ScheduleValues


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


class Updater:
    """AdamW and the moving average over a model's parameters."""

    def __init__(self, model: IJEPA, config: OptimConfig):
        self.max_grad_norm = config.max_grad_norm
        self.adamw = torch.optim.AdamW(
            parameter_groups(model), betas=config.betas, eps=config.eps, fused=True
        )
        pairs = ema_pairs(model)
        self.targets = [target for target, _ in pairs]
        self.sources = [source for _, source in pairs]

    @torch.no_grad()
    def update(self, loss: Tensor, values: ScheduleValues) -> tuple[Tensor, Tensor]:
        """Apply the gradients, or nothing where the loss or one of them is not finite.

        Returns:
            (gradient norm before clipping, whether the update was skipped), 0-d tensors.
        """
        gradients = [
            parameter.grad
            for group in self.adamw.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        grad_norm = nn.utils.get_total_norm(gradients)
        skipped = ~(torch.isfinite(grad_norm) & torch.isfinite(loss))
        if self.max_grad_norm is not None:
            torch._foreach_mul_(gradients, (self.max_grad_norm / grad_norm).clamp(max=1.0))
        for group in self.adamw.param_groups:
            group["lr"] = values.lr
            group["weight_decay"] = values.weight_decay if group["decayed"] else 0.0
        self.adamw.found_inf = skipped.float()
        self.adamw.step()
        # target += (1 - momentum) * (source - target), with a weight of zero on a skip
        weight = (1.0 - values.momentum) * (~skipped).to(grad_norm.dtype)
        change = torch._foreach_sub(self.sources, self.targets)
        torch._foreach_mul_(change, weight)
        torch._foreach_add_(self.targets, change)
        return grad_norm, skipped

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.adamw.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        """AdamW's state."""
        return self.adamw.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Restore `state_dict`'s result."""
        self.adamw.load_state_dict(state)
