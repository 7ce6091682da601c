"""A task by its name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ijepa.data.procedural.dataset import procedural_source
from ijepa.evaluate.tasks.cifar import cifar
from ijepa.evaluate.tasks.clevr import clevr
from ijepa.evaluate.tasks.folders import class_folders
from ijepa.evaluate.tasks.lists import csv_lists, inat18, places205
from ijepa.evaluate.tasks.task import Split, Task, TaskDataError

# The sets that a run's closing table takes: seed 0 is trained on, seed 1 is held out.
_TRAIN_SEED, _TEST_SEED, _TEST_IMAGES = 0, 1, 2_000
# Task -> (procedural set, its label).
_RENDERED = {
    "shapes": ("shapes", "shape"),
    "scenes-count": ("scenes", "count"),
    "scenes-dist": ("scenes", "distance"),
}
# Task -> (folder, channels) to the task.
_ON_DISK: dict[str, Callable[[Path, int], Task]] = {
    "folder": class_folders,
    "csv": csv_lists,
    "cifar10": lambda path, channels: cifar(path, "cifar10"),
    "cifar100": lambda path, channels: cifar(path, "cifar100"),
    "clevr-count": lambda path, channels: clevr(path, "clevr-count", channels),
    "clevr-dist": lambda path, channels: clevr(path, "clevr-dist", channels),
    "inat18": inat18,
    "places205": places205,
}
TASKS = (*_RENDERED, *_ON_DISK)


def open_task(
    name: str,
    path: str | os.PathLike | None = None,
    *,
    channels: int = 3,
    image_size: tuple[int, int] | None = None,
    progress: bool = True,
) -> Task:
    """A task by its name.

    Args:
        name: one of `TASKS`.
        path: where it lies on disk; the rendered ones have none.
        channels: 3 (RGB) or 1 (luma), of images read from files.
        image_size: (height, width) of the rendered ones; default: their own.
        progress: show a bar while rendering.

    Raises:
        TaskDataError: data that are missing, or not as expected; shows the layout.
        ValueError: an unknown task, or a path too many.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    if name in _RENDERED:
        if path is not None:
            raise ValueError(f"{name} is rendered and has no path, got {path}")
        return _rendered(name, image_size, progress)
    if path is None:
        raise TaskDataError(f"{name} needs the path of its data: --path PATH")
    folder = Path(path).expanduser()
    if not folder.exists():
        raise TaskDataError(f"{name}: nothing at {folder}")
    return _ON_DISK[name](folder, channels)


def _rendered(name: str, image_size: tuple[int, int] | None, progress: bool) -> Task:
    procedure, label = _RENDERED[name]
    parts = []
    for count, seed in ((None, _TRAIN_SEED), (_TEST_IMAGES, _TEST_SEED)):
        source = procedural_source(
            procedure, num_images=count, image_size=image_size, seed=seed, progress=progress
        )
        parts.append(Split(source, source.labels[label]))
    return Task(name, parts[0], parts[1], tuple(source.class_names[label]))
