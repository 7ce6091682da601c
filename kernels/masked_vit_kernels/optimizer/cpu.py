"""The optimiser step on CPU tensors.

Large tensors are updated by one loop that Inductor compiles, where a C++ compiler exists: every
element of p, m, v, g and the target is read once and written once. Otherwise, and for what is too
small to repay the call, PyTorch's own fused AdamW and foreach lerp do the work in a few passes.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from masked_vit_kernels.optimizer.slots import GroupValues, Slot

# A call of compiled code costs 50 to 100 us in guards (measured, one core); the passes it saves are
# worth less below this size.
COMPILED_MIN_NUMEL = 1 << 16


def step_on_cpu(
    slots: Sequence[Slot],
    gradients: Sequence[Tensor | None],
    steps: Sequence[Tensor],
    groups: Sequence[GroupValues],
    *,
    grad_norm: float,
    max_grad_norm: float | None,
    momentum: float,
    compiled: bool,
) -> None:
    """Update every slot; `steps` (0-d tensors, one a slot) advance where there is a gradient."""
    clip = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (grad_norm + 1e-6))
    one_pass = OnePass.shared() if compiled and compiler_exists() else None
    left: dict[int, list[int]] = {}
    idle = [slot for slot, gradient in zip(slots, gradients, strict=True) if gradient is None]
    for index, (slot, gradient) in enumerate(zip(slots, gradients, strict=True)):
        if gradient is None:
            continue
        if one_pass is not None and slot.numel >= COMPILED_MIN_NUMEL:
            step = float(steps[index]) + 1.0
            values = _coefficients(groups[slot.group], step, clip, momentum)
            if one_pass(*_operands(slot, gradient), values):
                steps[index].fill_(step)
                continue
        left.setdefault(slot.group, []).append(index)
    _average(idle, momentum)
    for group, members in left.items():
        _several_passes(
            [slots[i] for i in members],
            _present(gradients[i] for i in members),
            [steps[i] for i in members],
            groups[group],
            clip,
            momentum,
        )


def sum_squares(gradients: Sequence[Tensor]) -> Tensor:
    """0-d float64: the sum of squares of all gradients, in float32 within each of them."""
    filled = [gradient for gradient in gradients if gradient.numel()]
    if not filled:
        return torch.zeros((), dtype=torch.float64)
    norms = torch._foreach_norm(filled, 2, dtype=torch.float32)
    return torch.stack(norms).double().square().sum()


def compiler_exists() -> bool:
    """A C++ compiler that Inductor would find."""
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)


def _coefficients(group: GroupValues, step: float, clip: float, momentum: float) -> Tensor:
    """(9,) float32; the differences 1 - beta**t and 1 - momentum are taken in float64."""
    return torch.tensor(
        [
            clip,
            1.0 - group.beta1,
            group.beta2,
            1.0 - group.beta2,
            1.0 - group.lr * group.weight_decay,
            group.lr / (1.0 - group.beta1**step),
            1.0 / math.sqrt(1.0 - group.beta2**step),
            group.eps,
            1.0 - momentum,
        ]
    )


def _operands(slot: Slot, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return (
        slot.master,
        slot.shadow,
        gradient,
        slot.exp_avg,
        slot.exp_avg_sq,
        slot.target_master,
        slot.target_shadow,
    )


def _update(master, shadow, gradient, exp_avg, exp_avg_sq, target, target_shadow, values) -> None:
    """One parameter, flat: AdamW, the moving average, the rounded copies of both."""
    clip, rate1, beta2, rate2, decay, step_size, correction, eps, ema_rate = values.unbind()
    gradient = gradient.float() * clip
    first = exp_avg + rate1 * (gradient - exp_avg)
    second = beta2 * exp_avg_sq + rate2 * gradient * gradient
    weight = decay * master - step_size * first / (second.sqrt() * correction + eps)
    exp_avg.copy_(first)
    exp_avg_sq.copy_(second)
    master.copy_(weight)
    if shadow is not None:
        shadow.copy_(weight)
    if target is not None:
        average = target + ema_rate * (weight - target)
        target.copy_(average)
        if target_shadow is not None:
            target_shadow.copy_(average)


class OnePass:
    """`_update` compiled for any size, until it turns out not to compile on this machine."""

    def __init__(self) -> None:
        self._function = torch.compile(_update, dynamic=True)
        self.works = True

    @staticmethod
    @functools.cache
    def shared() -> OnePass:
        return OnePass()

    def __call__(self, *operands: Tensor | None) -> bool:
        """Update, or return False with nothing touched: a compiler fails before code runs."""
        if self.works:
            try:
                self._function(*operands)
            except Exception as error:  # whatever a broken tool chain raises
                warnings.warn(f"the one-pass update does not compile here: {error}", stacklevel=2)
                self.works = False
        return self.works


def _several_passes(
    slots: list[Slot],
    gradients: list[Tensor],
    steps: list[Tensor],
    group: GroupValues,
    clip: float,
    momentum: float,
) -> None:
    masters = _present(slot.master for slot in slots)
    gradients = [gradient.float() for gradient in gradients]
    if clip != 1.0:
        gradients = list(torch._foreach_mul(gradients, clip))
    adamw(
        masters,
        gradients,
        _present(slot.exp_avg for slot in slots),
        _present(slot.exp_avg_sq for slot in slots),
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=group.beta1,
        beta2=group.beta2,
        lr=group.lr,
        weight_decay=group.weight_decay,
        eps=group.eps,
        maximize=False,
    )
    _round(masters, [slot.shadow for slot in slots])
    _average(slots, momentum)


def _average(slots: list[Slot], momentum: float) -> None:
    """target <- momentum * target + (1 - momentum) * source, for the slots that have a target."""
    slots = [slot for slot in slots if slot.target is not None]
    if not slots:
        return
    masters = [s.source.flat.float() if s.master is None else s.master for s in slots]
    averages = _present(slot.target_master for slot in slots)
    torch._foreach_lerp_(averages, masters, 1.0 - momentum)
    _round(averages, [slot.target_shadow for slot in slots])


def _round(values: list[Tensor], shadows: list[Tensor | None]) -> None:
    """Copy each value into its rounded copy, where it has one."""
    pairs = [(s, v) for s, v in zip(shadows, values, strict=True) if s is not None]
    if pairs:
        torch._foreach_copy_([s for s, _ in pairs], [v for _, v in pairs])


def _present(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """The tensors of slots that all have one, which a slot's type does not say."""
    return cast(list[Tensor], list(tensors))
