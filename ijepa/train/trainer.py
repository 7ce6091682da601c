"""One training step: losses of the micro-batches, gradients, and the update.

The step never waits for the device: what it returns are 0-d tensors, to be read one step late.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch._dynamo
from torch import Tensor
from torch.optim import Optimizer

from ijepa.config import OptimConfig, ScheduleConfig
from ijepa.masks.batch import MaskBatch
from ijepa.masks.layout import layout_of
from ijepa.model import IJEPA
from ijepa.train.cuda_graph import CapturedStep
from ijepa.train.distributed import collective, sum_over_ranks, world_size
from ijepa.train.optim import (
    apply_schedule,
    compute_targets_in_float8,
    make_optimizer,
    optimizer_of_rounded_weights,
)
from ijepa.train.parallel.alone import Alone
from ijepa.train.parallel.replicated import Replicated
from ijepa.train.parallel.sharded import Sharded, gathered, is_sharded, shard, shard_like
from ijepa.train.schedules import schedule_at
from ijepa.vit import Block


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        loss: 0-d float32, mean over all elements of the step.
        grad_norm: 0-d float32, before clipping.
        skipped: 0-d bool, the update was left out because loss or gradients were not finite.
        consecutive_skips: 0-d int64, steps skipped in a row up to and including this one.
        lr, weight_decay, momentum: used at this step.
    """

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor
    consecutive_skips: Tensor
    lr: float
    weight_decay: float
    momentum: float


class StepGivenUp(Exception):
    """A step was left between two of its micro-batches; nothing was updated."""


class LateResult:
    """A step's figures on their way to the host, to be read while the next step runs."""

    def __init__(self, done: int, result: StepResult):
        self.done, self.result = done, result
        figures = (result.loss, result.grad_norm, result.skipped, result.consecutive_skips)
        self._host = torch.stack([figure.double() for figure in figures]).to(
            "cpu", non_blocking=True
        )
        self._copied = None
        if result.loss.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> tuple[float, float, bool, int]:
        """(loss, gradient norm, skipped, skipped steps in a row)."""
        if self._copied is not None:
            self._copied.synchronize()
        loss, grad_norm, skipped, in_a_row = self._host.tolist()
        return loss, grad_norm, bool(skipped), int(in_a_row)


class Trainer:
    """Trains a model step by step, on every rank alike where there are several.

    Args:
        schedule_config: with its lengths in steps.
        precision: "fp32"; "bf16" for autocast of the forward pass; "bf16-params" turns the model's
            weights into bfloat16 copies of float32 masters that the optimiser keeps.
        target_precision: "same", or "fp8" for the target encoder's products in a bf16 `precision`.
        compile: trace the forward and backward passes with torch.compile, once for each layout of
            the masks (at most four with planned capacities). "blocks" traces the transformer
            blocks alone, one graph for all of a network: seconds instead of minutes for a deep
            model, and a little more memory traffic from block to block. Several ranks always trace
            the blocks alone: one backward pass for everything would leave the gradients to travel
            when it is over.
        cuda_graph: replay whole steps as CUDA graphs (`ijepa.train.cuda_graph`); for one process,
            and for steps of one micro-batch. Gradients are then no longer to be found in `.grad`.
        parallel: what several ranks do, nothing in a single process: "ddp" holds the model on each,
            "fsdp" turns its weights into shards, "hsdp" into shards within a machine and replicas
            over machines (`ijepa.train.parallel`).

    Attributes:
        step_index: steps taken, skipped ones included; the schedules follow it.
        give_up: asked between micro-batches; where it says yes the step raises StepGivenUp.
        updating: an update was begun and not ended, by an error in its middle: weights, moments and
            averages may be of different steps.
        compilations: seconds that the first step of each layout of the masks took, with `compile`.
        total_skips, consecutive_skips: 0-d int64 tensors on the model's device. Each step makes
            new ones, so that a reference taken at a step keeps that step's value.
    """

    def __init__(
        self,
        model: IJEPA,
        optim_config: OptimConfig,
        schedule_config: ScheduleConfig,
        *,
        precision: str = "fp32",
        target_precision: str = "same",
        compile: bool | Literal["blocks"] = False,
        cuda_graph: bool = False,
        parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp",
    ):
        if parallel not in ("ddp", "fsdp", "hsdp"):
            raise ValueError(f"parallel must be 'ddp', 'fsdp' or 'hsdp', got {parallel!r}")
        if precision not in ("fp32", "bf16", "bf16-params"):
            raise ValueError(
                f"precision must be 'fp32', 'bf16' or 'bf16-params', got {precision!r}"
            )
        if target_precision not in ("same", "fp8"):
            raise ValueError(f"target_precision must be 'same' or 'fp8', got {target_precision!r}")
        if target_precision == "fp8" and precision == "fp32":
            raise ValueError(
                "target_precision 'fp8' goes with precision 'bf16' or 'bf16-params', got 'fp32'"
            )
        if schedule_config.total_steps is None or schedule_config.warmup_epochs is not None:
            raise ValueError(
                "the schedule's lengths must be known in steps, got"
                f" total_steps={schedule_config.total_steps} and"
                f" warmup_epochs={schedule_config.warmup_epochs}: give total_steps and"
                " warmup_steps, or take the schedule of `Recipe.in_steps(number of images)`"
            )
        self.model = model
        self.schedule = schedule_config
        sharded = world_size() > 1 and parallel != "ddp"
        if sharded and target_precision == "fp8":
            raise ValueError(
                f"target_precision 'fp8' needs whole weights on every rank, which parallel "
                f"{parallel!r} does not leave: take 'ddp', or target_precision 'same'"
            )
        if sharded:
            shard(model, hybrid=parallel == "hsdp", rounded=precision != "fp32")
        self.autocast = precision == "bf16" and not sharded
        if precision == "bf16-params" and not sharded:
            self.optimizer = optimizer_of_rounded_weights(model, optim_config)
        else:
            self.optimizer = make_optimizer(model, optim_config)
        if target_precision == "fp8":
            compute_targets_in_float8(model, self.optimizer)
        self.step_index = 0
        self.updating = False
        self.give_up: Callable[[], bool] = lambda: False
        device = next(model.parameters()).device
        if cuda_graph and (device.type != "cuda" or world_size() > 1):
            raise ValueError(
                "cuda_graph needs a model on a CUDA device and a single process, got one on"
                f" {device.type} in {world_size()}: leave train.cuda_graph out"
            )
        loss: Callable[..., Tensor] = model
        self.compilations: dict[tuple, float] = {}
        self._compiles = bool(compile)
        if compile and world_size() > 1:
            _compile_blocks_of_ranks(model)
        elif compile == "blocks":
            _compile_blocks(model)
        elif compile:
            # a function of its own: the model stays as it is, state-dict names included
            loss = torch.compile(model.forward, fullgraph=True, dynamic=False)
        if world_size() == 1:
            self._gradients: Alone | Replicated | Sharded = Alone(model, loss)
        else:
            self._gradients = Sharded(model, loss) if sharded else Replicated(model, loss)
        self._replayed = None
        if cuda_graph:
            self._replayed = CapturedStep(
                lambda images, masks: self._update([images], [masks]),
                self.optimizer.upload_hyper_parameters,
            )
        self.total_skips = torch.zeros((), dtype=torch.int64, device=device)
        self.consecutive_skips = torch.zeros((), dtype=torch.int64, device=device)

    def step(
        self, images: Tensor | Sequence[Tensor], masks: MaskBatch | Sequence[MaskBatch]
    ) -> StepResult:
        """One optimiser step.

        Args:
            images: (B, C, Hi, Wi), or one such tensor for each micro-batch.
            masks: theirs. However a batch is cut into micro-batches, every predicted element
                weighs the same.

        Raises:
            ValueError: not as many image tensors as masks.
        """
        image_parts = [images] if isinstance(images, Tensor) else list(images)
        mask_parts = [masks] if isinstance(masks, MaskBatch) else list(masks)
        if len(image_parts) != len(mask_parts) or not image_parts:
            raise ValueError(
                f"a step needs as many image tensors as masks, at least one,"
                f" got {len(image_parts)} and {len(mask_parts)}"
            )
        started = time.perf_counter()
        values = schedule_at(self.schedule, self.step_index)
        apply_schedule(self.optimizer, values)
        for part in image_parts:
            self.model.prepare(part.shape[0])
        if self._replayed is not None and len(image_parts) == 1:
            self.updating = True
            loss = self._replayed(image_parts[0], mask_parts[0])
        else:
            loss = self._update(image_parts, mask_parts)
        if self._compiles:
            layout = tuple(layout_of(part) for part in mask_parts)
            self.compilations.setdefault(layout, time.perf_counter() - started)
        # the optimiser overwrites its own at the next step
        grad_norm, skipped = self.optimizer.grad_norm.clone(), self.optimizer.skipped.clone()
        self.step_index += 1
        self.total_skips = self.total_skips + skipped
        self.consecutive_skips = (self.consecutive_skips + 1) * skipped
        self.updating = False
        return StepResult(loss, grad_norm, skipped, self.consecutive_skips, *values)

    def _update(self, images: list[Tensor], masks: list[MaskBatch]) -> Tensor:
        """Gradients and the optimiser's step; the loss, 0-d."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._accumulate(images, masks)
        self.updating = True
        with collective():  # shards have to agree on the norm
            self.optimizer.step(loss=loss)
        return loss

    def _accumulate(self, images: list[Tensor], masks: list[MaskBatch]) -> Tensor:
        """Gradients of the mean over the step's elements, on all ranks; returns that mean, 0-d."""
        counts = torch.stack([self.model.count_elements(part) for part in masks])
        denominator = sum_over_ranks(counts.sum()).clamp(min=1)
        total = torch.zeros((), device=denominator.device)
        for number, (part, part_masks) in enumerate(zip(images, masks, strict=True)):
            if number and self.give_up():
                raise StepGivenUp
            with self._gradients.micro_batch(number, len(images)):
                with torch.autocast(part.device.type, torch.bfloat16, enabled=self.autocast):
                    loss = self._gradients.loss(part, part_masks, denominator)
                loss.backward()
            total = total + loss.detach()
        self._gradients.finish()
        return sum_over_ranks(total)

    @property
    def sharded(self) -> bool:
        """Whether every rank holds shards alone, so that saving takes all of them."""
        return is_sharded(self.model)

    def weights(self) -> dict[str, Tensor]:
        """The model's state dict, with float32 masters in the place of rounded weights.

        Of a sharded model they are DTensors.
        """
        return {
            name: tensor.detach()
            if tensor.dtype != torch.bfloat16
            else self.optimizer.master(tensor).detach()
            for name, tensor in self.model.state_dict(keep_vars=True).items()
        }

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """The inverse of `weights`, whichever way the model is shared: whole tensors by name.

        Raises:
            RuntimeError: names or shapes that are not the model's.
        """
        own = self.model.state_dict(keep_vars=True)
        for name, tensor in own.items():
            if name in weights and weights[name].shape != tensor.shape:
                raise RuntimeError(
                    f"{name} has shape {tuple(weights[name].shape)} there and "
                    f"{tuple(tensor.shape)} here"
                )
        parts = {
            name: shard_like(value, own[name]) if name in own else value
            for name, value in weights.items()
        }
        self.model.load_state_dict(parts)
        for name, tensor in own.items():
            if tensor.dtype == torch.bfloat16:
                self.optimizer.master(tensor).copy_(weights[name])

    def _masters(self) -> dict[Tensor, Tensor]:
        """Copies of the float32 values of rounded weights."""
        tensors = self.model.state_dict(keep_vars=True).values()
        rounded = [tensor for tensor in tensors if tensor.dtype == torch.bfloat16]
        return {tensor: self.optimizer.master(tensor).detach().clone() for tensor in rounded}

    @torch.no_grad()
    def whole_model(self, wanted: bool) -> IJEPA | None:
        """The model to look at from outside of a step: itself, or a whole copy of a sharded one.

        All ranks of a sharded model have to call it together.

        Args:
            wanted: whether this rank will look; others get None for a sharded model.
        """
        if not self.sharded:
            return self.model
        copy = None
        if wanted:
            device = self.total_skips.device
            with torch.random.fork_rng(), device:
                copy = IJEPA(self.model.config)
        own = {} if copy is None else copy.state_dict()
        for name, tensor in self.model.state_dict().items():
            with collective():
                whole = gathered(tensor)
            if name in own:
                own[name].copy_(whole)
        return copy

    def state_dict(self) -> dict:
        """Optimiser state, step and counters; the model's weights are not in it."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "step_index": self.step_index,
            "total_skips": self.total_skips.clone(),
            "consecutive_skips": self.consecutive_skips.clone(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: entries are missing or unknown.
        """
        expected = {"optimizer", "step_index", "total_skips", "consecutive_skips"}
        if set(state) != expected:
            raise ValueError(f"trainer state must hold {sorted(expected)}, got {sorted(state)}")
        # A sharded run's weights are its masters, which is what `load_weights` has left here.
        masters = {} if _holds_masters(state["optimizer"]) else self._masters()
        self.optimizer.load_state_dict(_placed(state["optimizer"], self.optimizer))
        with torch.no_grad():
            for tensor, master in masters.items():
                self.optimizer.master(tensor).copy_(master)
        self.optimizer.refresh_float8_copies()
        if self._replayed is not None:
            self._replayed.forget()
        self.step_index = int(state["step_index"])
        device = self.total_skips.device
        self.total_skips = state["total_skips"].to(device)
        self.consecutive_skips = state["consecutive_skips"].to(device)


def _compile_blocks(model: IJEPA) -> None:
    """Trace every block in place; state-dict names stay, and blocks of one size share their code.

    Torch refuses a function's ninth graph unless told otherwise; a step of four layouts has the
    first, middle and last blocks of three networks in each.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(fullgraph=True, dynamic=False)


def _compile_blocks_of_ranks(model: IJEPA) -> None:
    """As `_compile_blocks`, with the hooks that gather weights left outside of the traced code.

    A block is one unit of gradients already: it need not be cut at DDP's buckets.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    torch._dynamo.config.optimize_ddp = False
    for module in model.modules():
        if isinstance(module, Block):
            module.forward = torch.compile(  # type: ignore[method-assign]
                module.forward, fullgraph=True, dynamic=False
            )


def _holds_masters(state: dict) -> bool:
    return any("master" in entry for entry in state["state"].values())


def _placed(state: dict, optimizer: Optimizer) -> dict:
    """An optimiser's state, whole tensors replaced by shards where its parameters are sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in state["param_groups"] for n in group["params"]]
    if len(parameters) != len(numbers):
        return state  # refused by load_state_dict, which says how
    placed = dict(state["state"])
    for parameter, number in zip(parameters, numbers, strict=True):
        if number in placed:
            placed[number] = {
                name: shard_like(value, parameter) if value.ndim else value
                for name, value in placed[number].items()
            }
    return state | {"state": placed}
