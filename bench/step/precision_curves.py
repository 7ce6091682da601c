"""Loss curves of one small run in float32, bfloat16 and with float8 targets, same data.

python -m bench.step.precision_curves --steps 500 --out bench/results

The residual stream is float32 or bfloat16 in the two bfloat16 modes. Images are the procedural
shapes, masks and initial weights the same in all runs.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bench.filing import RESULTS, device_name
from ijepa import IJEPA, Trainer
from ijepa.config import Recipe
from ijepa.counter_rng import derive_keys
from ijepa.data.procedural.shapes import render_shapes
from ijepa.disk import write_whole
from ijepa.masks.from_config import build_mask_sampler
from ijepa.recipes import load_recipe

Residual = Literal["fp32", "bf16"]
RUNS: dict[str, tuple[str, Residual, str]] = {  # label -> precision, residual stream, targets
    "fp32": ("fp32", "fp32", "same"),
    "bf16 autocast": ("bf16", "fp32", "same"),
    "bf16 autocast, bf16 residual": ("bf16", "bf16", "same"),
    "bf16 weights": ("bf16-params", "fp32", "same"),
    "bf16 weights, bf16 residual": ("bf16-params", "bf16", "same"),
    "bf16 weights, fp8 targets": ("bf16-params", "fp32", "fp8"),
}
CPU_MODEL = {"model.image_size": [24, 24], "model.width": 32, "model.depth": 2, "model.heads": 2,
             "model.predictor_width": 16, "model.predictor_depth": 1, "model.predictor_heads": 1,
             "train.batch_size": 4}  # fmt: skip
GPU_MODEL = {"model.image_size": [64, 64], "model.width": 384, "model.depth": 6, "model.heads": 6,
             "model.predictor_width": 192, "model.predictor_depth": 3, "model.predictor_heads": 6,
             "train.batch_size": 64}  # fmt: skip
IMAGES = 4096


def make_recipe(steps: int, device: torch.device) -> Recipe:
    """The demo's recipe with a model for the device."""
    overrides = GPU_MODEL if device.type == "cuda" else CPU_MODEL
    return load_recipe("shapes-tiny", {**overrides, "train.steps": steps}).in_steps(IMAGES)


def render(recipe: Recipe) -> Tensor:
    """The images that the runs see, (n, 3, H, W) uint8, once for all of them."""
    seen = min(IMAGES, recipe.train.num_steps * recipe.train.batch_size)
    images = render_shapes(np.arange(seen), recipe.model.image_size, 0)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def losses_of(label: str, recipe: Recipe, images: Tensor, device: torch.device) -> list[float]:
    """The loss of every step; read at the end."""
    precision, residual, targets = RUNS[label]
    config = replace(recipe.model, residual=residual)
    torch.manual_seed(0)
    trainer = Trainer(
        IJEPA(config).to(device), recipe.optim, recipe.schedule, precision=precision,
        target_precision=targets,
    )  # fmt: skip
    batch = recipe.train.batch_size
    sampler = build_mask_sampler(recipe.masks, config.grid, batch, torch.device("cpu"))
    losses = []
    for step in range(recipe.train.num_steps):
        part = images[torch.arange(step * batch, (step + 1) * batch) % len(images)]
        masks = sampler(keys=derive_keys(3, step, np.arange(batch)))
        losses.append(trainer.step(part.to(device), masks.to(device)).loss)
    return torch.stack(losses).cpu().tolist()


def main() -> None:
    """Train all runs and file their curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = make_recipe(arguments.steps, device)
    images, curves = render(recipe), {}
    for label in RUNS:
        started = time.process_time()
        curves[label] = losses_of(label, recipe, images, device)
        seconds = time.process_time() - started
        tail = curves[label][-50:]
        print(
            f"{label:30} mean of the last {len(tail)} losses {np.mean(tail):.5f}, {seconds:.0f} s"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = device_name(device.type).replace(" ", "-")
    result = {"device": device_name(device.type), "torch": torch.__version__, "losses": curves}
    write_whole(arguments.out / f"precision-{name}.json", json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
