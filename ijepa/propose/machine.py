"""What this machine is, and how fast it takes steps of a recipe."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import numpy as np
import torch

from ijepa.config import Recipe
from ijepa.counter_rng import derive_keys
from ijepa.data import ImageSource, load_batch
from ijepa.masks.from_config import build_mask_sampler
from ijepa.train import from_recipe
from ijepa.train.trainer import Trainer

_WARM_UP, _MOST_STEPS, _SECONDS = 2, 20, 3.0
_DECODED = 32  # images
_LARGEST_TIMED = 64  # images of a timed step: the rate hardly rises from there


@dataclass(frozen=True)
class Machine:
    """Where a run is to take place.

    Attributes:
        device: "cpu" or "cuda".
        label: what it is, for people.
        cores: that this process may use.
        memory: bytes, of the GPU, or of the machine where there is none.
    """

    device: str
    label: str
    cores: int
    memory: int


@dataclass(frozen=True)
class Speed:
    """Seconds that an image takes: in a step, and to be read, decoded and cropped by one core."""

    step: float
    decode: float


def this_machine(device: torch.device) -> Machine:
    """The machine this runs on, with its first GPU where the device is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return Machine("cuda", gpu.name, cores, gpu.total_memory)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine("cpu", f"{cores} CPU {'core' if cores == 1 else 'cores'}", cores, memory)


def measure_speed(recipe: Recipe, source: ImageSource) -> Speed:
    """Take a few steps of a new network on images of the source; about five seconds.

    Steps run as they are, not compiled: where the recipe compiles, the run is somewhat faster.
    """
    device = from_recipe.choose_device(recipe.train.device)
    count = min(recipe.train.batch_size // recipe.train.accumulate, _LARGEST_TIMED)
    transform = from_recipe.training_transform(recipe)
    keys = derive_keys(0, np.arange(_DECODED, dtype=np.uint64))
    numbers = np.linspace(0, len(source) - 1, num=_DECODED).astype(int)
    decode = _seconds(lambda: load_batch(source, numbers, transform, keys)) / _DECODED
    # Of a small folder some pixels are kept in memory, so that only the first time counts.

    trainer = Trainer(
        from_recipe.build_model(recipe).to(device),
        recipe.optim,
        recipe.in_steps(max(len(source), recipe.train.batch_size)).schedule,
        precision=recipe.train.precision,
    )
    sampler = build_mask_sampler(recipe.masks, recipe.model.grid, count, device)
    shape = (count, recipe.model.channels, *recipe.model.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        trainer.step(images, sampler(count, generator).to(device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(_WARM_UP):
        step()
    taken: list[float] = []
    while len(taken) < _MOST_STEPS and sum(taken) < _SECONDS:
        taken.append(_seconds(step))
    return Speed(float(np.median(taken)) / count, decode)


def _seconds(function) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began
