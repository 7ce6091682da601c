"""Runs small enough for a test: 32 procedural images of 16 px, a ViT 16 wide and 2 deep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ijepa.config import Recipe
from ijepa.recipes import load_recipe

SETTINGS: dict[str, Any] = {
    "model.image_size": [16, 16],
    "model.init": "released",
    "model.rescale_init": True,
    "model.target_norm": "layer",
    "model.width": 16,
    "model.depth": 2,
    "model.heads": 2,
    "model.predictor_width": 8,
    "model.predictor_depth": 1,
    "model.predictor_heads": 1,
    "data.num_images": 32,
    "data.num_held_out": 20,
    "data.workers": 0,
    "train.steps": 12,
    "train.batch_size": 6,  # five steps an epoch
    "train.device": "cpu",
    "train.checkpoint_every": 4,
    "train.log_every": 1,
    "schedule.warmup_steps": 3,
    "monitor.every": 0,
    "monitor.images": 16,
    "monitor.evaluate": False,
}


def small_recipe(output, **overrides: Any) -> Recipe:
    """The recipe with `train__steps=3` and the like on top, writing into `output`."""
    changed = {name.replace("__", "."): value for name, value in overrides.items()}
    return load_recipe("shapes-tiny", {**SETTINGS, **changed, "train.output": str(output)})


def small_arguments(output, **overrides: Any) -> list[str]:
    """The same as command-line arguments."""
    changed = {name.replace("__", "."): value for name, value in overrides.items()}
    arguments = ["shapes-tiny"]
    for key, value in {**SETTINGS, **changed, "train.output": str(output)}.items():
        flag = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(flag if value else flag.replace(".", ".no-", 1))
        else:
            values = value if isinstance(value, list) else [value]
            arguments += [flag, *map(str, values)]
    return arguments


def photographs(folder: Path, count: int, classes: int = 2) -> dict[str, Any]:
    """`count` small images, in turn in one of so many class folders; one class is a flat folder.

    Returns:
        The settings that train on them.
    """
    for number in range(count):
        inside = folder / f"class-{number % classes}" if classes > 1 else folder
        inside.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (20, 24, 3)).byte().numpy()
        Image.fromarray(pixels).save(inside / f"{number}.png")
    return {"data__source": "folder", "data__path": str(folder)}
