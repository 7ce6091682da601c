"""Rasterized, block and random masks."""

import math

import numpy as np
import pytest
from mask_checks import block_sides, boolean_masks, draw_keys

from ijepa.masks.strategies import BlockSampler, RandomSampler, RasterizedSampler


@pytest.mark.parametrize("grid", [(14, 14), (2, 9), (5, 7)])
def test_rasterized(grid):
    batch = RasterizedSampler(grid)(keys=draw_keys(400))
    context, targets = boolean_masks(batch)
    parts = np.concatenate([context[:, None], targets], axis=1)  # (B, 4, rows, columns)
    assert batch.num_targets == 3
    assert (parts.sum(axis=1) == 1).all()  # every patch in one quadrant
    heights, widths = block_sides(parts)
    for sides, size in ((heights, grid[0]), (widths, grid[1])):
        assert set(sides.ravel()) == {size // 2, size - size // 2}
    corners = context[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean(axis=0)
    np.testing.assert_allclose(corners, 0.25, atol=0.08)


@pytest.mark.parametrize("grid", [(14, 14), (2, 9), (5, 7)])
def test_block_and_random_take_the_complement(grid):
    num_patches = math.prod(grid)
    for sampler in (BlockSampler(grid), RandomSampler(grid)):
        batch = sampler(keys=draw_keys(400))
        context, targets = boolean_masks(batch)
        assert batch.num_targets == 1
        assert (context ^ targets[:, 0]).all()
        assert targets.mean() == pytest.approx(0.6, abs=0.08)
        often = targets[:, 0].mean(axis=0)
        assert (often > 0.05).all()
        if isinstance(sampler, RandomSampler):
            assert set(targets.sum(axis=(1, 2, 3))) == {round(0.6 * num_patches)}
            np.testing.assert_allclose(often, 0.6, atol=0.12)
        else:
            block_sides(targets)
