"""AdamWEMA on several ranks: DTensor shards, and one decision for all."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from masked_vit_kernels import AdamWEMA
from masked_vit_kernels.optimizer.ranks import agree, shard_groups
from torch import nn

SHAPES = [(6, 4), (5,), (1, 3)]  # over two ranks: even, uneven, and empty on the second
STEPS = 3


def whole_tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def train_whole() -> list[torch.Tensor]:
    """The same steps on one rank with torch's own pieces."""
    parameters = [nn.Parameter(w) for w in whole_tensors(0)]
    targets = [p.detach() + 1 for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for step in range(STEPS):
        for p, g in zip(parameters, whole_tensors(step + 1), strict=True):
            p.grad = g
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        torch._foreach_lerp_(targets, [p.detach() for p in parameters], 0.1)
    return [p.detach() for p in parameters] + targets


def run_rank(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        shards_give_the_norm_and_the_update_of_the_whole()
        ranks_skip_together(rank)
    finally:
        dist.destroy_process_group()


def shards_give_the_norm_and_the_update_of_the_whole() -> None:
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))

    def sharded(tensor: torch.Tensor) -> DTensor:
        return distribute_tensor(tensor, mesh, [Shard(0)])

    parameters = [nn.Parameter(sharded(w)) for w in whole_tensors(0)]
    targets = [sharded(w + 1) for w in whole_tensors(0)]
    optimizer = AdamWEMA(
        parameters,
        lr=1e-2,
        ema=list(zip(targets, parameters, strict=True)),
        momentum=0.9,
        max_grad_norm=0.5,
    )
    for step in range(STEPS):
        gradients = whole_tensors(step + 1)
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = sharded(g)
        optimizer.step(loss=torch.tensor(1.0))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        assert torch.allclose(optimizer.grad_norm, norm, rtol=1e-5)
    for mine, expected in zip([*parameters, *targets], train_whole(), strict=True):
        assert isinstance(mine, DTensor)
        assert torch.allclose(mine.full_tensor(), expected, rtol=1e-6, atol=1e-7)
    assert isinstance(optimizer.state[parameters[0]]["exp_avg"], DTensor)
    assert len(shard_groups(parameters)) == 1
    with pytest.raises(ValueError, match="same mesh dimensions"):
        shard_groups([*parameters, torch.zeros(3)])


def ranks_skip_together(rank: int) -> None:
    """One rank's loss is not finite: both skip, as replicas of data parallelism must."""
    parameter = nn.Parameter(torch.ones(4))
    optimizer = AdamWEMA([parameter], lr=0.1, process_group=dist.group.WORLD)
    for loss, skipped in ((1.0 if rank else float("nan"), True), (1.0, False)):
        parameter.grad = torch.ones(4)
        optimizer.step(loss=torch.tensor(loss))
        assert bool(optimizer.skipped) == skipped
        assert torch.equal(parameter, torch.ones(4)) == skipped
    assert optimizer.grad_norm == 2.0


def test_two_ranks():
    with_free_port = torch.distributed.TCPStore("127.0.0.1", 0, 1, True)
    port = with_free_port.port
    del with_free_port
    mp.spawn(run_rank, args=(port,), nprocs=2)


def test_agreement_without_ranks():
    squares = torch.tensor(4.0)
    assert agree(squares, torch.tensor(1.0), [], None).tolist() == [4.0, 0.0]
    assert agree(squares, torch.tensor(float("inf")), [], None).tolist() == [4.0, float("inf")]
    assert agree(squares * torch.nan, None, [], None)[1] == float("inf")
