"""Pictures and clips that need no download: coloured discs on gradients, at rest and in motion."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def clips(count: int, frames: int, size: int, generator: torch.Generator) -> Tensor:
    """(count, 3, frames, size, size) float32 about in [-1, 1]: three discs that move and bounce."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    axis = torch.linspace(0, 1, size)
    angle = 2 * math.pi * uniform(1, 1)
    slope = angle.cos() * axis[None, :, None] + angle.sin() * axis  # (count, size, size)
    picture = (uniform(3, 1, 1, 1) - 0.5) * 2 + 0.7 * slope[:, None, None]
    picture = picture.expand(count, 3, frames, size, size).clone()
    time = torch.arange(frames).view(1, frames, 1, 1)
    for _ in range(3):
        start, speed = uniform(2, 1, 1, 1), (uniform(2, 1, 1, 1) - 0.5) * 0.25
        place = 1 - (1 - (start + speed * time) % 2).abs()  # bounces between 0 and 1
        rows, columns = axis.view(1, 1, size, 1), axis.view(1, 1, 1, size)
        distance = (rows - place[:, 0]) ** 2 + (columns - place[:, 1]) ** 2
        inside = distance < (0.08 + 0.17 * uniform(1, 1, 1)) ** 2  # (count, frames, size, size)
        picture = torch.where(inside[:, None], (uniform(3, 1, 1, 1) - 0.5) * 2, picture)
    return picture


def images(count: int, size: int, generator: torch.Generator) -> Tensor:
    """(count, 3, size, size): one frame each."""
    return clips(count, 1, size, generator)[:, :, 0]
