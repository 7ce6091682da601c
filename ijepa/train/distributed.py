"""Data parallelism under torchrun; every function is a no-op in a single process.

The process group starts only where torchrun's environment says so. Each rank takes its share of
every batch. Losses are divided by the step's global element count, so gradients are summed, not
averaged, and the number of ranks changes nothing but the order of additions.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from ijepa.train.lost_ranks import RankRegister

Value = TypeVar("Value")

_register: RankRegister | None = None  # of the process group, while there is one


def start(device: torch.device) -> torch.device:
    """Join the process group that torchrun describes; returns this rank's own device.

    Without RANK and WORLD_SIZE in the environment nothing happens.
    """
    if not launched_with_others():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    # This module holds the default group in default arguments. Imported after the group exists
    # (torch.compile does so) it would keep it past `stop`, and with it gloo's threads,
    # which then sometimes abort the process as it exits.
    importlib.import_module("torch.distributed.nn.functional")
    store, number, ranks = next(rendezvous("env://"))
    global _register
    _register = RankRegister(store, number, ranks)  # before the group, which waits for all of them
    backend = "nccl" if device.type == "cuda" else "gloo"  # checkpoints have a gloo group of theirs
    dist.init_process_group(backend, store=store, rank=number, world_size=ranks)
    return device


def launched_with_others() -> bool:
    """Whether torchrun started several processes of which this is one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def launched_rank() -> int:
    """This process's number as it was started, also where there is no process group (any more)."""
    return int(os.environ["RANK"]) if launched_with_others() else 0


def stop() -> None:
    """Leave the process group."""
    global _register
    _register = None
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(reason: str) -> None:
    """Tell the other ranks why this one ends before its time."""
    if _register is not None:
        _register.leave(reason)


def collective() -> contextlib.AbstractContextManager[None]:
    """Around every collective operation: where it fails, `RankLost` names the rank that is gone."""
    return contextlib.nullcontext() if _register is None else _register.collective()


def rank() -> int:
    """This process's number, 0 in a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def machines() -> int:
    """Number of machines, as torchrun has counted them."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes files and talks to the user."""
    return rank() == 0


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized():
        with collective():
            dist.barrier()


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of every rank's tensor, on every rank; the tensor itself in a single process."""
    if world_size() > 1:
        value = value.clone()
        with collective():
            dist.all_reduce(value)
    return value


def from_main(value: object) -> object:
    """Rank 0's picklable value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    with collective():
        dist.broadcast_object_list(box)
    return box[0]


def gather_to_main(value: object) -> list | None:
    """Every rank's picklable value in order of the ranks, on rank 0; None elsewhere."""
    if world_size() == 1:
        return [value]
    box: list[object] | None = [None] * world_size() if is_main() else None
    with collective():
        dist.gather_object(value, box)
    return box


def on_main(function: Callable[[], Value]) -> Value:
    """What rank 0 gets from `function`, on every rank; an error is raised on every rank too."""
    result: object = None
    if is_main():
        try:
            result = function()
        except (ValueError, OSError) as error:
            if world_size() == 1:
                raise
            result = error
    result = from_main(result)
    if isinstance(result, Exception):
        raise result
    return result  # type: ignore[return-value]


def require_same(values: Mapping[str, object]) -> None:
    """Compare what has to be the same on every rank, picklable values by name.

    Raises:
        ValueError: on every rank, naming the first value that differs and where.
    """
    if world_size() == 1:
        return
    found: list = [None] * world_size()
    with collective():
        dist.all_gather_object(found, dict(values))
    for number, others in enumerate(found):
        for name in found[0] | others:
            here, there = found[0].get(name), others.get(name)
            if here != there:
                raise ValueError(
                    f"the ranks would train different runs: {name} is {here} on rank 0 and "
                    f"{there} on rank {number}"
                )


class LateVote:
    """Whether any rank said yes, told one call later, so that nobody waits for the device.

    Every rank must ask equally often, and all hear the same answer at the same call. A single
    process hears its own answer at once.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pending: Tensor | None = None

    def any(self, value: bool) -> bool:
        """This rank's vote now; returns the ranks' verdict on the call before."""
        if world_size() == 1:
            return value
        previous = self._pending
        self._pending = sum_over_ranks(torch.tensor(float(value), device=self._device))
        return previous is not None and bool(previous.item())
