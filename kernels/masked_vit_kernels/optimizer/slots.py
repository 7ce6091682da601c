"""What one optimiser step touches: every parameter with its state, gradient and moving average.

A `Slot` holds the flat views of one parameter or of one EMA pair that is not trained. Slots are
built when the optimiser first steps and again whenever a tensor has moved, was added or loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from masked_vit_kernels.optimizer.multi_tensor import (
    FlatView,
    flat_view,
    is_dense,
    layout_of,
    local,
)

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class GroupValues(NamedTuple):
    """Hyper-parameters of one parameter group at one step; 0-d tensors stay on the device."""

    lr: float | Tensor
    beta1: float | Tensor
    beta2: float | Tensor
    eps: float
    weight_decay: float


@dataclass
class Slot:
    """One parameter, or one untrained source of a moving average.

    Attributes:
        parameter: the tensor whose `.grad` drives the update.
        group: index of its parameter group, -1 for an untrained source (never updated).
        source: its weights, written by the update.
        master: (numel,) float32 weights; `source.flat` where that is float32 already; None for an
            untrained source of lower precision.
        exp_avg, exp_avg_sq: (numel,) float32 moments, None for an untrained source.
        target: weights of the EMA partner, None without one.
        target_master: (numel,) float32 moving average; `target.flat` where that is float32.
    """

    parameter: Tensor
    group: int
    source: FlatView
    master: Tensor | None
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None
    target: FlatView | None
    target_master: Tensor | None

    @property
    def trained(self) -> bool:
        return self.group >= 0

    @property
    def numel(self) -> int:
        return self.source.flat.numel()

    @property
    def shadow(self) -> Tensor | None:
        """(numel,) the parameter where it is the rounded copy of a float32 master."""
        return None if self.source.flat.dtype == torch.float32 else self.source.flat

    @property
    def target_shadow(self) -> Tensor | None:
        """(numel,) the target where it is the rounded copy of a float32 average."""
        if self.target is None or self.target.flat.dtype == torch.float32:
            return None
        return self.target.flat

    def gradient(self) -> Tensor | None:
        """(numel,) this step's gradient in the layout of the moments, None where there is none."""
        gradient = self.parameter.grad
        if gradient is None or not self.trained:
            return None
        if gradient.is_sparse:
            raise ValueError("AdamWEMA does not take sparse gradients")
        gradient = local(gradient)
        like = self.source.original
        alike = gradient.is_contiguous() and like.is_contiguous()
        if alike or (is_dense(gradient) and layout_of(gradient) == layout_of(like)):
            return flat_view(gradient)
        return flat_view(torch.empty_like(like, dtype=gradient.dtype).copy_(gradient))

    def staged_views(self) -> list[FlatView]:
        views = [self.source] if self.target is None else [self.source, self.target]
        return [view for view in views if view.staged]


def complete_state(
    state: dict[str, Tensor], parameter: Tensor, target: Tensor | None
) -> dict[str, Tensor]:
    """Add what `state` lacks and make what it holds fit the parameter, in place.

    step 0-d; exp_avg, exp_avg_sq float32; master and ema_master where parameter and target are
    rounded. All but step have the parameter's device, placement and memory layout.
    """
    state.setdefault("step", torch.zeros(()))
    for name in ("exp_avg", "exp_avg_sq"):
        if name in state:
            state[name] = conform(state[name], parameter)
        else:
            state[name] = torch.zeros_like(parameter, dtype=torch.float32)
    for name, weight in (("master", parameter), ("ema_master", target)):
        if weight is None or weight.dtype == torch.float32:
            state.pop(name, None)
        else:
            state[name] = conform(state.get(name, weight), parameter)
    return state


def conform(value: Tensor, like: Tensor) -> Tensor:
    """`value` as float32 with the device, placement and memory layout of `like`."""
    fits = (
        value.dtype == torch.float32
        and value.device == like.device
        and layout_of(local(value)) == layout_of(torch.empty_like(local(like), device="meta"))
    )
    if fits:
        return value
    return torch.empty_like(like, dtype=torch.float32).copy_(value)


def build_slot(
    parameter: Tensor, group: int, state: dict[str, Tensor], target: Tensor | None
) -> Slot:
    """The slot of a trained parameter with its completed state."""
    moment = local(state["exp_avg"])
    source = FlatView(local(parameter), moment)
    target_view = None if target is None else FlatView(local(target), moment)
    target_master = None if target_view is None else target_view.flat
    if "ema_master" in state:
        target_master = flat_view(local(state["ema_master"]))
    return Slot(
        parameter=parameter,
        group=group,
        source=source,
        master=flat_view(local(state["master"])) if "master" in state else source.flat,
        exp_avg=flat_view(moment),
        exp_avg_sq=flat_view(local(state["exp_avg_sq"])),
        target=target_view,
        target_master=target_master,
    )


def build_untrained_slot(source: Tensor, target: Tensor, ema_master: Tensor | None) -> Slot:
    """The slot of an EMA pair whose source no parameter group holds."""
    like = torch.empty_like(local(target))
    source_view, target_view = FlatView(local(source), like), FlatView(local(target), like)
    return Slot(
        parameter=source,
        group=-1,
        source=source_view,
        master=source_view.flat if source.dtype == torch.float32 else None,
        exp_avg=None,
        exp_avg_sq=None,
        target=target_view,
        target_master=target_view.flat if ema_master is None else flat_view(local(ema_master)),
    )


def check_pair(target: Tensor, source: Tensor, position: int) -> None:
    """Raise ValueError unless the pair can be averaged."""
    if local(target).shape != local(source).shape:
        raise ValueError(
            f"ema pair {position}: target {tuple(target.shape)} and source {tuple(source.shape)} "
            "must have one shape"
        )
    for name, tensor in (("target", target), ("source", source)):
        if tensor.dtype not in WEIGHT_DTYPES:
            raise ValueError(f"ema pair {position}: {name} must be floating, got {tensor.dtype}")
    if target is source:
        raise ValueError(f"ema pair {position}: target and source are one tensor")


class Plan:
    """The slots of an optimiser, all on one device, and their step counts in one tensor.

    Attributes:
        slots: trained parameters in the order of their groups, then untrained EMA pairs.
        steps: (P,) float32, one a slot; `step_views` are its entries.
        placement: addresses it was built for; a tensor that has moved makes it stale.
        staged: flat views that are copies and need loading and storing.
        written: parameters and targets, whose version counters every step advances.
    """

    def __init__(self, slots: list[Slot], steps: list[Tensor], placement: list[int]):
        devices = {slot.source.flat.device for slot in slots}
        devices |= {slot.target.flat.device for slot in slots if slot.target is not None}
        if len(devices) != 1:
            raise ValueError(f"parameters and targets must share one device, got {devices}")
        self.slots, self.placement = slots, placement
        self.device = devices.pop()
        counts = [step.to(self.device, torch.float32).reshape(()) for step in steps]
        counts += [torch.zeros((), device=self.device)] * (len(slots) - len(steps))
        self.steps = torch.stack(counts)
        self.step_views = [self.steps[i] for i in range(len(slots))]
        self.staged = [view for slot in slots for view in slot.staged_views()]
        targets = [slot.target.original for slot in slots if slot.target is not None]
        self.written = [slot.source.original for slot in slots if slot.trained] + targets
        self.num_trained_elements = sum(slot.numel for slot in slots if slot.trained)
