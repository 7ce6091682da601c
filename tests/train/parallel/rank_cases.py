"""The same steps on several ranks and in one process: a model and batches small enough for both."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ijepa import IJEPA, MaskBatch, ModelConfig, OptimConfig, ScheduleConfig, Trainer
from ijepa.train import distributed

CONFIG = ModelConfig(
    image_size=(16, 16), patch_size=(4, 4), width=16, depth=2, heads=2,
    predictor_width=8, predictor_depth=1, predictor_heads=1,
)  # fmt: skip
SCHEDULE = ScheduleConfig(total_steps=20, warmup_steps=2, momentum=0.9)
IMAGES = 8
CONTEXT = [[0, 1, 5], [2, 3, 4, 5, 6, 11], [8], [9, 14], [0], [7, 8, 9], [1, 2, 15], [3, 4, 10, 12]]
TARGETS = [
    [[2, 3], [7, 10, 11]], [[0], [0, 1]], [[1, 4, 5, 7], [11, 10, 9, 2]], [[15], [12, 13]],
    [[4, 5], [6]], [[1, 2, 3], [10]], [[8], [9, 10, 11]], [[0, 1], [6, 7]],
]  # fmt: skip


def make_trainer(config: ModelConfig = CONFIG, eps: float = 1e-3, **settings) -> Trainer:
    """Weights as drawn from seed 0; Adam's eps is large, for rounding must not decide a step."""
    torch.manual_seed(0)
    return Trainer(IJEPA(config), OptimConfig(eps=eps, max_grad_norm=1.0), SCHEDULE, **settings)


def step(trainer: Trainer, number: int, accumulate: int = 1):
    """This rank's share of step `number`, whatever the number of ranks and micro-batches."""
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(IMAGES, 3, 16, 16, generator=generator)
    ranks, rank = distributed.world_size(), distributed.rank()
    share = IMAGES // (ranks * accumulate)
    starts = [(part * ranks + rank) * share for part in range(accumulate)]
    grid = trainer.model.config.grid
    return trainer.step(
        [images[start : start + share] for start in starts],
        [
            MaskBatch.from_lists(
                CONTEXT[start : start + share], TARGETS[start : start + share], grid
            )
            for start in starts
        ],
    )


def whole_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every weight in full, on every rank; float32 masters of rounded ones."""
    weights = trainer.weights()
    return {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()
        for name, tensor in weights.items()
    }


def on_ranks(function: Callable[..., object], ranks: int, folder: Path, *arguments) -> list:
    """What `function(*arguments)` returned on each of so many gloo ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    mp.spawn(_run_rank, (ranks, str(folder), function, arguments), nprocs=ranks)
    return [torch.load(folder / f"rank-{n}", weights_only=True) for n in range(ranks)]


def _run_rank(rank: int, ranks: int, folder: str, function, arguments) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(max(ranks // 2, 1))  # as on two machines
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/group",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(minutes=3),  # where another one died
    )
    try:
        torch.save(function(*arguments), f"{folder}/rank-{rank}")
    finally:
        dist.destroy_process_group()
