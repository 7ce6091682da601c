"""What ranks must agree on before an optimiser step: the gradient norm and whether to skip."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def shard_groups(parameters: Sequence[Tensor]) -> list[dist.ProcessGroup]:
    """The groups over which DTensor parameters are sharded; empty for ordinary tensors.

    Raises:
        ValueError: the parameters are not all sharded over the same mesh dimensions.
    """
    found = {_sharding(parameter) for parameter in parameters}
    if len(found) > 1:
        raise ValueError("all parameters must be sharded over the same mesh dimensions, or none")
    mesh, dimensions = found.pop() if found else (None, ())
    return [] if mesh is None else [mesh.get_group(dimension) for dimension in dimensions]


def _sharding(parameter: Tensor) -> tuple[DeviceMesh | None, tuple[int, ...]]:
    """The mesh of a DTensor and the dimensions it is sharded over; (None, ()) for a tensor."""
    mesh = getattr(parameter, "device_mesh", None)
    placements = getattr(parameter, "placements", ())
    return mesh, tuple(d for d, place in enumerate(placements) if place.is_shard())


def agree(
    squares: Tensor,
    loss: Tensor | None,
    shards: Sequence[dist.ProcessGroup],
    process_group: dist.ProcessGroup | None,
) -> Tensor:
    """This rank's sum of squares and loss -> (2,) float64 that is the same on every rank.

    Entry 0 is the sum of squares over the shards; entry 1 is 0, or infinite where any rank's loss
    or sum is not finite. No host sync.
    """
    infinite = squares.new_full((), torch.inf, dtype=torch.float64)
    finite = torch.isfinite(squares)
    if loss is not None:
        finite = finite & torch.isfinite(loss.detach())
    values = torch.stack([squares.double(), torch.where(finite, 0.0, infinite)])
    for group in shards:
        dist.all_reduce(values, group=group)
    if process_group is not None:
        dist.all_reduce(values[1:], group=process_group)
    return values
