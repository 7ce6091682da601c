"""What an image gets whose draws all left too little context, so that every sampler ends.

Packed masks: after `DRAWS` draws the M target blocks all take the place of the first one, and the
context is the largest block of the settings less that one. `multiblock.py` refuses settings with
which that would not be enough, or with which more than `MAX_FALLBACK_SHARE` of the images would
come here. The released distribution goes on placing context blocks instead, which may overlap more
and more targets (`truncated.py`). `MaskBatch.fallbacks` counts the images of either.
"""

from __future__ import annotations

import numpy as np

from ijepa.masks.blocks import place_blocks

DRAWS = 8  # draws of an image before the fallback
MAX_FALLBACK_SHARE = 0.05  # of the images, in the constructor's trial


def fallback_masks(
    bits: np.ndarray, targets: np.ndarray, largest_context: np.ndarray, grid: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """One place for all targets, the largest context.

    Args:
        bits: (B,) uint64, where the contexts go.
        targets: (B, M, rows, columns) bool, of the last draw.
        largest_context: (2,) height and width.

    Returns:
        Context (B, rows, columns) and targets (B, M, rows, columns), bool.
    """
    first = targets[:, :1]
    height, width = largest_context
    context = place_blocks(bits, height, width, grid) & ~first[:, 0]
    return context, np.repeat(first, targets.shape[1], axis=1)
