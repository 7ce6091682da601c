"""What a recipe costs on this machine, beside its progress."""

from __future__ import annotations

import shlex

import torch

from ijepa.config import Recipe
from ijepa.cost.flops import flops_per_image
from ijepa.cost.gpus import known_gpu


def images_per_second_at_peak(recipe: Recipe, device: torch.device, ranks: int) -> float | None:
    """What the matmul rate of all ranks' GPUs would allow, None where it is not known."""
    gpu = known_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if gpu is None:
        return None
    flops = flops_per_image(recipe, recipe.micro_batch_size(ranks))
    return ranks * gpu.teraflops * 1e12 / flops


def smaller_run(recipe: Recipe, device: torch.device) -> str:
    """What to try where a recipe would take for ever on this machine."""
    if device.type == "cuda":
        return f"Fewer train.epochs, or more GPUs: see `ijepa plan {recipe.name} --gpus N`"
    if recipe.data.path is None:
        return "Without a GPU a small recipe fits: `ijepa pretrain shapes-tiny`"
    words = shlex.join(["ijepa", "pretrain", "--data.path", recipe.data.path])
    return f"A recipe for these images on this machine is made by `{words}`"
