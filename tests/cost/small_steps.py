"""A model of odd sizes and images with masks for it."""

import numpy as np
import torch

from ijepa import ModelConfig, MultiBlockSampler
from ijepa.counter_rng import derive_keys

CONFIG = ModelConfig(
    image_size=(48, 40),
    patch_size=(8, 8),
    width=48,
    depth=3,
    heads=3,
    mlp_ratio=3.0,
    predictor_width=24,
    predictor_depth=2,
    predictor_heads=3,
)


def draw(config, images=6, seed=3):
    masks = MultiBlockSampler(config.grid)(keys=derive_keys(seed, np.arange(images)))
    shape = (images, config.channels, *config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)), masks
