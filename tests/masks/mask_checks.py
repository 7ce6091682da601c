"""What the tests of the masks share: keys, and masks as booleans."""

import numpy as np

from ijepa.counter_rng import derive_keys
from ijepa.masks.batch import MaskBatch

SEED = 20240
CONTEXT, TARGETS, PREDICTOR, UNION = range(4)  # columns of `image_sizes`


def draw_keys(count: int, seed: int = SEED) -> np.ndarray:
    return derive_keys(seed, np.arange(count))


def boolean_masks(batch: MaskBatch) -> tuple[np.ndarray, np.ndarray]:
    """Context (B, rows, columns) and targets (B, M, rows, columns) bool."""
    images, blocks, (rows, columns) = batch.batch_size, batch.num_targets, batch.grid
    context = np.zeros((images, rows * columns), dtype=bool)
    targets = np.zeros((images, blocks, rows * columns), dtype=bool)
    for image in range(images):
        context[image, batch.context_of(image).numpy()] = True
        for block, ids in enumerate(batch.targets_of(image)):
            targets[image, block, ids.numpy()] = True
    return context.reshape(-1, rows, columns), targets.reshape(-1, blocks, rows, columns)


def block_sides(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(..., rows, columns) bool -> heights, widths; fails where a mask is no full rectangle."""
    heights, widths = blocks.any(axis=-1).sum(axis=-1), blocks.any(axis=-2).sum(axis=-1)
    assert (blocks.sum(axis=(-2, -1)) == heights * widths).all()
    return heights, widths
