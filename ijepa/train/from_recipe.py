"""What a run is built of, made from its recipe: device, data, masks, networks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from ijepa.config import Recipe
from ijepa.cost.memory import count_parameters, state_bytes
from ijepa.counter_rng import derive_keys, random_bits
from ijepa.data import build_source, load_batch
from ijepa.data.batch import batch_labels
from ijepa.data.sources import ImageSource
from ijepa.data.views import CenterCrop, RandomResizedCrop, Squash, Transform
from ijepa.evaluate.images import LabelledImages, ProbesNotFitted
from ijepa.model import IJEPA
from ijepa.report.progress import telling
from ijepa.train import distributed

_SUBSET_STREAM = 0x5AB5E7
_TRAINING_SET, _HELD_OUT_SET = 0, 1  # seeds of the procedural data sets, whatever the run's seed


def choose_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is a device.

    Raises:
        ValueError: CUDA asked for and not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device is 'cuda', but torch sees no CUDA device (see ijepa doctor)")
    return torch.device(name)


def compiles(recipe: Recipe, device: torch.device) -> bool | Literal["blocks"]:
    """What of the step is to be compiled: all of it on a GPU unless told otherwise."""
    if recipe.train.compile == "auto":
        return device.type == "cuda"
    return "blocks" if recipe.train.compile == "blocks" else recipe.train.compile == "on"


def chosen_parallel(recipe: Recipe, device: torch.device) -> Literal["ddp", "fsdp", "hsdp"]:
    """How ranks share the model: replicas as long as they leave half of a GPU to activations."""
    if recipe.train.parallel != "auto":
        return recipe.train.parallel
    if device.type != "cuda":
        return "ddp"
    state = state_bytes(count_parameters(recipe.model), recipe.train.precision)
    if 2 * state <= torch.cuda.get_device_properties(device).total_memory:
        return "ddp"
    return "hsdp" if distributed.machines() > 1 else "fsdp"


def build_model(recipe: Recipe) -> IJEPA:
    """The networks as initialised from the recipe's seed, on the CPU."""
    torch.manual_seed(recipe.train.seed)
    return IJEPA(recipe.model)


def open_source(recipe: Recipe, console: Console | None) -> ImageSource:
    """The training images; procedural ones are rendered now, by the first rank.

    Args:
        console: told what takes a while.

    Raises:
        ValueError: no such folder, no image in it, or no path given.
    """
    if recipe.data.source == "folder" and recipe.data.path is None:
        raise ValueError(
            "no images given: add --data.path FOLDER (any folder of images, labels not needed), "
            "or try --data.source shapes"
        )
    if not distributed.is_main():
        distributed.barrier()
    looking = console if recipe.data.source == "folder" else None  # rendering shows a bar
    with telling(looking, f"Looking for images in {recipe.data.path}"):
        source = _build(recipe, recipe.data.num_images, _TRAINING_SET, console is not None)
    if distributed.is_main():
        distributed.barrier()
    return source


def labelled_images(recipe: Recipe, source: ImageSource, progress: bool) -> LabelledImages:
    """Images for the closing probes, of a source with labels.

    Raises:
        ProbesNotFitted: too few images.
    """
    view = viewing_transform(recipe)
    held_out, fitted = recipe.data.num_held_out, recipe.monitor.probe_images
    if recipe.data.source == "folder":
        held_out = min(held_out, len(source) // 5)
        if held_out == 0:
            raise ProbesNotFitted(
                f"a fifth of the labelled images is kept for testing, which takes at least 5, and "
                f"there are {len(source)}"
            )
        images, labels = load_subset(source, view, fitted + held_out)
        parts = images[held_out:], images[:held_out]
        train_labels = {task: values[held_out:] for task, values in labels.items()}
        test_labels = {task: values[:held_out] for task, values in labels.items()}
        return LabelledImages(parts[0], train_labels, parts[1], test_labels)
    test = held_out_source(recipe, progress)
    return LabelledImages(*load_subset(source, view, fitted), *load_subset(test, view, held_out))


def held_out_source(recipe: Recipe, progress: bool) -> ImageSource:
    """Rendered images that no run is trained on, as many as the recipe keeps for its probes."""
    return _build(recipe, recipe.data.num_held_out, _HELD_OUT_SET, progress)


def _build(recipe: Recipe, num_images: int, seed: int, progress: bool) -> ImageSource:
    return build_source(
        recipe.data.source,
        path=recipe.data.path,
        channels=recipe.model.channels,
        num_images=num_images,
        image_size=recipe.model.image_size,
        seed=seed,
        progress=progress,
    )


def training_transform(recipe: Recipe) -> Transform:
    """Random crops of the model's image size."""
    data = recipe.data
    return RandomResizedCrop(
        recipe.model.image_size,
        scale=data.crop_scale,
        interpolation=data.interpolation,
        flip=data.flip,
    )


def viewing_transform(recipe: Recipe) -> Transform:
    """The whole of a rendered image; the centre of a photograph."""
    size, interpolation = recipe.model.image_size, recipe.data.interpolation
    if recipe.data.source == "folder":
        return CenterCrop(size, interpolation=interpolation)
    return Squash(size, interpolation=interpolation)


def load_subset(
    source: ImageSource, transform: Transform, count: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """`count` images, spread over the source by a fixed draw, and their labels by task.

    Returns:
        (n, C, H, W) uint8 and task -> (n,) int64, n at most len(source).
    """
    key = derive_keys(_SUBSET_STREAM)
    order = random_bits(key.reshape(1), len(source))[0].argsort(kind="stable")
    batch = load_batch(source, order[:count], transform)
    return batch.images, batch_labels(source, batch)


def data_fingerprint(source: ImageSource) -> dict[str, int | str]:
    """How many images there are, and a hash over the names of up to 1000 of them."""
    numbers = np.unique(np.linspace(0, len(source) - 1, num=min(len(source), 1000)).astype(int))
    names: Sequence[str] = [source.name(int(number)).rpartition("/")[2] for number in numbers]
    digest = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()
    return {"images": len(source), "names": digest[:16]}
