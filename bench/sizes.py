"""The shapes the token ops are timed at: released models, masks as the sampler draws them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ijepa.counter_rng import derive_keys
from ijepa.masks.batch import MaskBatch
from ijepa.masks.multiblock import MultiBlockSampler


@dataclass(frozen=True)
class Shape:
    """A model, its batch and its grid; `batching` as of the mask sampler."""

    name: str
    batch: int
    grid: tuple[int, int]
    patch: int
    width: int
    predictor_width: int = 384

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def masks(self, batching: Literal["packed", "truncate"] = "packed") -> MaskBatch:
        """One batch of masks, the same in every run."""
        sampler = MultiBlockSampler(self.grid, batching=batching)
        return sampler(keys=derive_keys(0, np.arange(self.batch)))


SHAPES = {
    "cuda": [
        Shape("H/14 batch 128", 128, (16, 16), 14, 1280),
        Shape("B/16 batch 256", 256, (14, 14), 16, 768),
        Shape("H/16 448 px batch 32", 32, (28, 28), 16, 1280),
    ],
    "cpu": [Shape("B/16 batch 8", 8, (14, 14), 16, 768)],
}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
EVERY_SHAPE = [
    (device, shape)
    for device in (["cuda"] if torch.cuda.is_available() else ["cpu"])
    for shape in SHAPES[device]
]
