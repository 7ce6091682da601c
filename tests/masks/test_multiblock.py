"""The default masks: sizes, independence, reach, and the fallback."""

import math

import numpy as np
import pytest
from mask_checks import CONTEXT, block_sides, boolean_masks, draw_keys

from ijepa.masks.multiblock import MultiBlockSampler


@pytest.mark.parametrize(
    ("side", "context", "over_128", "predictor", "predictor_over_128"),
    [
        (14, (38, 90, 149), 0.014, (123, 184), 0.40),
        (16, (40, 118, 192), 0.32, (162, 240), 0.94),
        (28, (137, 361, 580), 1.00, (498, 736), 1.00),
    ],
)
def test_packed_statistics(side, context, over_128, predictor, predictor_over_128):
    """Sizes of the paper's settings, as an independent simulation of them gave."""
    sampler = MultiBlockSampler((side, side))
    context_sizes, sequences = [], []
    for seed in range(8):
        batch = sampler(keys=draw_keys(512, seed))
        context_sizes.append(batch.context_packing.cu_seqlens.diff().numpy())
        sequences.append(batch.predictor_packing.cu_seqlens.diff().numpy())
        assert batch.fallbacks == batch.redraws == 0
    context_sizes, sequences = np.concatenate(context_sizes), np.concatenate(sequences)
    assert context_sizes.mean() == pytest.approx(context[1], rel=0.02)
    assert context_sizes.min() == pytest.approx(context[0], rel=0.4)
    assert context_sizes.max() == pytest.approx(context[2], rel=0.06)
    assert (context_sizes > 128).mean() == pytest.approx(over_128, abs=0.03)
    assert sequences.mean() == pytest.approx(predictor[0], rel=0.02)
    assert sequences.max() == pytest.approx(predictor[1], rel=0.06)
    assert (sequences > 128).mean() == pytest.approx(predictor_over_128, abs=0.03)


def test_packed_blocks_are_independent_and_reach_everywhere():
    batch = MultiBlockSampler((14, 14))(keys=draw_keys(2000))
    context, targets = boolean_masks(batch)
    heights, widths = block_sides(targets)
    areas, aspects = heights * widths, heights / widths
    assert abs(np.corrcoef(areas.ravel(), aspects.ravel())[0, 1]) < 0.15
    assert abs(np.corrcoef(areas[:, 0], areas[:, 1])[0, 1]) < 0.1  # blocks of one image
    assert areas.mean() / 196 == pytest.approx(0.175, rel=0.02)
    # The middle of (.75, 1.5) is 1.125; whole patches shift the mean ratio by little.
    assert aspects.mean() == pytest.approx(1.125, rel=0.04)
    assert len(set(areas[0])) > 1 or len(set(areas[1])) > 1

    for masks in (context, targets.any(axis=1)):
        often = masks.mean(axis=0)  # (rows, columns)
        assert (often > 0).all()
        np.testing.assert_allclose(often, often[::-1], atol=0.06)  # no edge is favoured
        np.testing.assert_allclose(often, often[:, ::-1], atol=0.06)


@pytest.mark.parametrize("grid", [(2, 9), (9, 2), (32, 8), (6, 20)])
def test_packed_context_covers_its_share_of_a_long_grid(grid):
    """A square of .85 of a long grid does not fit: the block grows along the long side instead."""
    sampler = MultiBlockSampler(grid, target_scale=(0.01, 0.02), num_targets=1)
    share = sampler.image_sizes(draw_keys(500))[:, CONTEXT].mean() / math.prod(grid)
    assert 0.8 < share < 0.97


@pytest.mark.parametrize("grid", [(4, 4), (6, 6)])
@pytest.mark.parametrize("batching", ["packed", "truncate"])
def test_small_grids_end(grid, batching):
    """The released loop never ends on these grids."""
    sampler = MultiBlockSampler(grid, batching=batching)
    sizes = sampler.image_sizes(draw_keys(300))
    assert sizes[:, CONTEXT].min() >= sampler.min_context >= 2


def test_fallback_keeps_the_minimum():
    """Settings near the limit: 8 draws do not suffice for every image."""
    sampler = MultiBlockSampler((2, 9), target_scale=(0.3, 0.6), min_context=4)
    batch = sampler(keys=draw_keys(3000))
    context, targets = boolean_masks(batch)
    assert (context.sum(axis=(1, 2)) >= 4).all()
    assert not (context & targets.any(axis=1)).any()
    same_blocks = (targets == targets[:, :1]).all(axis=(1, 2, 3))
    assert 0 < batch.fallbacks <= same_blocks.sum() and batch.fallbacks < 0.1 * 3000
