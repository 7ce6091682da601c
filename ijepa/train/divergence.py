"""Training that has diverged, and which checkpoints are from before."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Diverged(RuntimeError):
    """Training cannot go on from where it is.

    Attributes:
        good_before: checkpoints of earlier steps are sound; None: all that were written.
    """

    def __init__(self, message: str, good_before: int | None = None):
        super().__init__(message)
        self.good_before = good_before


class TooManySkips(Diverged):
    """Loss or gradients were not finite for too many steps in a row."""


class WeightsNotFinite(Diverged):
    """An update overflowed: weights are infinite or NaN, and are not saved."""


def check_finite(weights: Mapping[str, Tensor], step: int) -> None:
    """Raise WeightsNotFinite where a tensor holds NaN or infinity; one wait for the device."""
    if not weights:
        return
    flags = torch.stack([tensor.isfinite().all() for tensor in weights.values()]).tolist()
    broken = [name for name, finite in zip(weights, flags, strict=True) if not finite]
    if broken:
        raise WeightsNotFinite(
            f"after step {step} {len(broken)} of {len(weights)} tensors are not finite, "
            f"{broken[0]} the first: an update overflowed. They are not saved. Start again with a "
            "lower schedule.peak_lr, optim.max_grad_norm, or train.precision fp32"
        )
