"""Training that has diverged, and which checkpoints are from before."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ijepa.train import distributed


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
    """Raise WeightsNotFinite where a tensor holds NaN or infinity; one wait for the device.

    Of sharded tensors every rank looks at its own part, and all raise where one does.
    """
    if not weights:
        return
    flags = torch.stack([~_local(tensor).isfinite().all() for tensor in weights.values()]).int()
    if any(isinstance(tensor, DTensor) for tensor in weights.values()):
        flags = distributed.sum_over_ranks(flags)
    broken = [name for name, found in zip(weights, flags.tolist(), strict=True) if found]
    if broken:
        raise WeightsNotFinite(
            f"after step {step} {len(broken)} of {len(weights)} tensors are not finite, "
            f"{broken[0]} the first: an update overflowed. They are not saved. Start again with a "
            "lower schedule.peak_lr, optim.max_grad_norm, or train.precision fp32"
        )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
