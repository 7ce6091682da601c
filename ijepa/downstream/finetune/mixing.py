"""Mixup, CutMix and label smoothing: images and labels of a batch blended with its mirror image.

Row b is mixed with row B - 1 - b, with one share for the whole batch, as timm's batch mode does.
"""

from __future__ import annotations

import math

import numpy as np
import torch.nn.functional as F
from torch import Tensor


def smoothed(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """(B,) labels -> (B, C) targets: 1 - smoothing on the label, smoothing / C on every class."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mixed(
    images: Tensor, targets: Tensor, mixup: float, cutmix: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """A batch mixed by one of the two, drawn by even chances where both are on.

    Args:
        images: (B, C, H, W) floating point.
        targets: (B, C).
        mixup, cutmix: alpha of the share's beta distribution; 0 turns one off.
    """
    if mixup <= 0 and cutmix <= 0:
        return images, targets
    use_cutmix = cutmix > 0 and (mixup <= 0 or rng.random() < 0.5)
    alpha = cutmix if use_cutmix else mixup
    share = float(rng.beta(alpha, alpha))
    if use_cutmix:
        images, share = _with_box(images, share, rng)
    else:
        images = share * images + (1 - share) * images.flip(0)
    return images, share * targets + (1 - share) * targets.flip(0)


def _with_box(images: Tensor, share: float, rng: np.random.Generator) -> tuple[Tensor, float]:
    """A box of 1 - share of the area is the other image's; the share that is really kept."""
    height, width = images.shape[2:]
    side = math.sqrt(1 - share)
    box_height, box_width = int(height * side), int(width * side)
    centre_row, centre_column = int(rng.integers(height)), int(rng.integers(width))
    top, bottom = max(centre_row - box_height // 2, 0), min(centre_row + box_height // 2, height)
    left, right = max(centre_column - box_width // 2, 0), min(centre_column + box_width // 2, width)
    images = images.clone()
    images[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    return images, 1 - (bottom - top) * (right - left) / (height * width)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, C), (B, C) -> the mean over the batch of -sum targets log softmax, in float32."""
    return -(targets * F.log_softmax(logits.float(), dim=1)).sum(dim=1).mean()


def step_generator(seed: int, step: int) -> np.random.Generator:
    """Draws for a step, the same however the run got there."""
    return np.random.default_rng([seed, step])
