"""How often each patch is context, and how often a target, over many draws."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ijepa.counter_rng import derive_keys
from ijepa.masks.sampler import MaskSampler

_STREAM = 0xC0FE


@dataclass(frozen=True)
class Coverage:
    """Shares of the images, (rows, columns) each.

    Attributes:
        context: a patch is among the context.
        target: a patch is in at least one target block.
        context_patches: patches of a context, mean over the images.
    """

    context: np.ndarray
    target: np.ndarray
    context_patches: float


def mask_coverage(sampler: MaskSampler, images: int, batch_size: int, seed: int) -> Coverage:
    """Coverage over at least `images` images, drawn in batches as training draws them."""
    rows, columns = sampler.grid
    patches = rows * columns
    context, target = np.zeros(patches), np.zeros(patches)
    batches = max(-(-images // batch_size), 1)
    for batch in range(batches):
        indices = np.arange(batch_size) + batch * batch_size
        masks = sampler(keys=derive_keys(seed, _STREAM, indices))
        ids = masks.context.numpy()
        context += np.bincount(ids[ids >= 0], minlength=patches)
        union = masks.target_union.numpy()
        target += np.bincount(union[union >= 0] % patches, minlength=patches)
    count = batches * batch_size
    return Coverage(
        (context / count).reshape(rows, columns),
        (target / count).reshape(rows, columns),
        float(context.sum() / count),
    )
