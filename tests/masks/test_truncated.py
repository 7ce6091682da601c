"""Truncated masks against the released procedure, written out."""

import math

import numpy as np
import pytest
import torch
from mask_checks import CONTEXT, SEED, TARGETS, UNION, block_sides, boolean_masks, draw_keys

from ijepa.masks.multiblock import MultiBlockSampler


def released_masks(rng, side: int, batch_size: int):
    """The released procedure as evaluation notes describe it, an image at a time, uncut.

    Returns context (B, side, side), targets (B, 4, side, side) bool.
    """

    def block_size(scale, aspect):
        draw = rng.random()
        area = int(side * side * (scale[0] + draw * (scale[1] - scale[0])))
        ratio = aspect[0] + draw * (aspect[1] - aspect[0])
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        return min(height, side - 1), min(width, side - 1)

    def place(size):
        mask = np.zeros((side, side), dtype=bool)
        top, left = rng.integers(0, side - size[0]), rng.integers(0, side - size[1])
        mask[top : top + size[0], left : left + size[1]] = True
        return mask

    target_size = block_size((0.15, 0.2), (0.75, 1.5))
    context_size = block_size((0.85, 1.0), (1.0, 1.0))
    context, targets = [], []
    for _ in range(batch_size):
        blocks = [place(target_size) for _ in range(4)]
        excluded, tries = 4, 0
        while True:
            mask = place(context_size)
            for block in blocks[:excluded]:
                mask &= ~block
            if mask.sum() > 10:
                break
            tries += 1
            if tries % 20 == 0:
                excluded -= 1
        context.append(mask)
        targets.append(blocks)
    return np.array(context), np.array(targets)


@pytest.mark.parametrize("side", [8, 14])
def test_truncate_has_the_released_distribution(side):
    """Means over batches, before and after the cut, against the procedure in plain loops."""
    rng = np.random.default_rng(SEED)
    sampler = MultiBlockSampler((side, side), batching="truncate")
    batches, batch_size = 100, 32
    ours, theirs, our_often, their_often = [], [], 0.0, 0.0
    for seed in range(batches):
        sizes = sampler.image_sizes(draw_keys(batch_size, seed))
        single = sampler.image_sizes(draw_keys(1, seed + batches))  # one image is cut to itself
        ours.append([*sizes.mean(axis=0)[[CONTEXT, TARGETS, UNION]], single[0, CONTEXT]])
        our_context, _ = boolean_masks(sampler(keys=draw_keys(batch_size, seed)))
        our_often = our_often + our_context.mean(axis=0) / batches

        context, targets = released_masks(rng, side, batch_size)
        sizes = context.sum(axis=(1, 2))
        union, targets = targets.any(axis=1).sum(axis=(1, 2)), targets.sum(axis=(1, 2, 3))
        theirs.append([sizes.min(), targets.mean(), union.mean(), sizes[0]])
        cut = context.reshape(batch_size, -1)
        cut = cut & (np.cumsum(cut, axis=1) <= sizes.min())
        their_often = their_often + cut.reshape(context.shape).mean(axis=0) / batches
    ours, theirs = np.array(ours), np.array(theirs)
    error = np.sqrt((ours.var(axis=0) + theirs.var(axis=0)) / batches)
    assert (abs(ours.mean(axis=0) - theirs.mean(axis=0)) <= 4 * error + 1e-9).all()
    np.testing.assert_allclose(our_often, their_often, atol=0.08)


@pytest.mark.parametrize(
    ("side", "shortest", "uncut", "target", "union"),
    [(14, 51, 82, 33, 87), (16, 70, 111, 44, 114), (28, 232, 359, 135, 354)],
)
def test_truncate_statistics(side, shortest, uncut, target, union):
    """The released collator's figures at batch 128."""
    sampler = MultiBlockSampler((side, side), batching="truncate")
    cut = [sampler.image_sizes(draw_keys(128, seed)) for seed in range(24)]
    single = np.concatenate([sampler.image_sizes(draw_keys(1, seed)) for seed in range(400)])
    assert np.mean([sizes[0, CONTEXT] for sizes in cut]) == pytest.approx(shortest, rel=0.06)
    assert single[:, CONTEXT].mean() == pytest.approx(uncut, rel=0.03)
    assert np.mean([sizes[:, TARGETS].mean() / 4 for sizes in cut]) == pytest.approx(
        target, rel=0.04
    )
    assert np.mean([sizes[:, UNION].mean() for sizes in cut]) == pytest.approx(union, rel=0.04)


def test_truncate_couples_the_batch_as_the_released_code_does():
    sampler = MultiBlockSampler((14, 14), batching="truncate")
    shapes = []
    for seed in range(60):
        context, targets = boolean_masks(sampler(keys=draw_keys(16, seed)))
        assert not context[:, -1].any() and not context[:, :, -1].any()
        assert not targets[:, :, -1].any() and not targets[:, :, :, -1].any()
        assert len(set(context.sum(axis=(1, 2)))) == 1
        heights, widths = block_sides(targets)
        assert len(set(zip(heights.ravel(), widths.ravel(), strict=True))) == 1
        shapes.append((heights[0, 0], widths[0, 0]))
    heights, widths = np.array(shapes).T
    # One draw sets scale and aspect: the tallest block is the largest, widths go down with heights.
    assert np.corrcoef(heights, heights * widths)[0, 1] > 0.6
    assert np.corrcoef(heights, widths)[0, 1] < -0.5
    assert len(set(shapes)) > 2


def test_truncate_ignores_the_order_of_a_batch():
    sampler = MultiBlockSampler((14, 14), batching="truncate")
    for seed in range(8):  # a few: the two orders may draw the same sizes by chance
        keys = draw_keys(9, seed)
        forward, backward = sampler(keys=keys), sampler(keys=keys[::-1])
        for image in range(9):
            assert torch.equal(forward.context_of(image), backward.context_of(8 - image))
