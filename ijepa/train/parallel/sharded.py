"""Weights, gradients and optimiser in shards: FSDP2's `fully_shard`, a block at a time.

A unit's weights are gathered before its forward pass and again before its backward pass, and freed
after each; gradients arrive as this rank's shard of their sum. The shards are float32. In the bf16
modes what is gathered is bfloat16 and what is summed float32; both modes are the same here.

The target encoder is sharded like the context encoder, so that the moving average runs on local
shards. It has no backward pass that would free its weights: every unit frees them after its
forward pass, or the next step would see those of before the average.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ijepa.model import IJEPA
from ijepa.train import distributed


def make_mesh(device: torch.device, hybrid: bool) -> DeviceMesh:
    """All ranks, or (machines, ranks of a machine) as torchrun has them.

    Raises:
        ValueError: `hybrid` on a single machine, or machines with different numbers of ranks.
    """
    ranks = distributed.world_size()
    if not hybrid:
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    if local >= ranks or ranks % local:
        raise ValueError(
            f"train.parallel 'hsdp' shards within a machine and replicates over machines, which "
            f"needs two or more with as many ranks each; there are {ranks} ranks, {local} of them "
            "here: take 'fsdp'"
        )
    shape = (ranks // local, local)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(model: IJEPA, *, hybrid: bool, rounded: bool) -> None:
    """Replace the model's weights by this rank's shards, in place; before its optimiser is made.

    Fixed positions stay whole and float32.

    Args:
        hybrid: shard within a machine, replicate over machines.
        rounded: compute with bfloat16 copies.
    """
    device = next(model.parameters()).device
    mesh = make_mesh(device, hybrid)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if rounded else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the residual stream is float32
    )
    networks = (
        (model.context_encoder, model.context_encoder.blocks),
        (model.target_encoder, model.target_encoder.blocks),
        (model.predictor, model.predictor.predictor_blocks),
    )
    averaged = {name for name, p in model.context_encoder.named_parameters() if p.requires_grad}
    fixed = {
        parameter
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and name.removeprefix("target_encoder.") not in averaged
    }
    for network, blocks in networks:
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        fully_shard(
            network, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=fixed
        )
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=fixed)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is divided by the global count
            module.set_force_sum_reduction_for_comms(True)


class Sharded:
    """Gradients of a model that `shard` was applied to; see `Alone` for the methods.

    Every micro-batch's gradients are reduced to shards at once, so that no rank ever holds all of
    them; over machines they are summed once a step.
    """

    def __init__(self, model: IJEPA, loss: Callable[..., Tensor]):
        self._root: FSDPModule = model  # type: ignore[assignment]  # fully_shard changed its class
        self.loss = loss

    @contextlib.contextmanager
    def micro_batch(self, number: int, count: int) -> Iterator[None]:
        """Around the forward and backward pass of micro-batch `number` of `count`, from 0."""
        last = number == count - 1
        self._root.set_requires_all_reduce(last)
        self._root.set_is_last_backward(last)
        with distributed.collective():
            yield

    def finish(self) -> None:
        """After the last one: every `.grad` is this rank's shard of the sum over all ranks."""


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was applied to it."""
    return isinstance(model, FSDPModule)


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank holds, placed as `like` is; no messages."""
    if not isinstance(like, DTensor) or isinstance(whole, DTensor):
        return whole
    return distribute_tensor(
        whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on every rank; all ranks must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
