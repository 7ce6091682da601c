"""The mask strategies: their distributions, their settings, their capacities."""

import math
import pickle
import re

import numpy as np
import pytest
import torch

from ijepa.captured import tensors_of
from ijepa.counter_rng import derive_keys
from ijepa.mask_batch import MaskBatch, MaskSizes
from ijepa.mask_sampler import MAX_CAPACITIES, plan_capacities
from ijepa.mask_strategies import BlockSampler, RandomSampler, RasterizedSampler
from ijepa.masks import MultiBlockSampler

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


# ---- packed ------------------------------------------------------------------------------------


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


# ---- truncate ----------------------------------------------------------------------------------


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


# ---- the other strategies ----------------------------------------------------------------------


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


# ---- how they are called -----------------------------------------------------------------------


def test_generator_gives_the_keys():
    sampler = MultiBlockSampler((14, 14))
    first = sampler(6, generator=torch.Generator().manual_seed(1))
    again = sampler(6, torch.Generator().manual_seed(1))
    other = sampler(6, torch.Generator().manual_seed(2))
    assert torch.equal(first.context, again.context) and torch.equal(first.targets, again.targets)
    assert not torch.equal(first.target_rows[:50], other.target_rows[:50])
    torch.manual_seed(3)
    default = sampler(6)
    torch.manual_seed(3)
    assert torch.equal(default.context, sampler(6).context)
    assert not torch.equal(default.context[:50], sampler(6).context[:50])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either batch_size or keys"),
        ({"batch_size": 2, "keys": draw_keys(2)}, "either batch_size or keys"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"keys": draw_keys(4).reshape(2, 2)}, r"keys must be uint64 of shape \(B,\)"),
        ({"keys": np.arange(4)}, "keys must be uint64"),
    ],
)
def test_bad_calls(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiBlockSampler((8, 8))(**arguments)


REFUSED = [
    (MultiBlockSampler, {"grid": (0, 4)}, "grid"),
    (MultiBlockSampler, {"grid": (1, 1), "num_targets": 1}, "grid"),
    (MultiBlockSampler, {"grid": (1, 9), "batching": "truncate"}, "grid"),
    (RasterizedSampler, {"grid": (1, 8)}, "grid"),
    (MultiBlockSampler, {"context_scale": (0.85, 1.2)}, "context_scale"),
    (MultiBlockSampler, {"target_scale": (0.2, 0.15)}, "target_scale"),
    (MultiBlockSampler, {"target_scale": (-0.1, 0.2)}, "target_scale"),
    (MultiBlockSampler, {"target_aspect": (0.0, 1.5)}, "target_aspect"),
    (MultiBlockSampler, {"num_targets": 0}, "num_targets"),
    (MultiBlockSampler, {"grid": (6, 6), "num_targets": 100_000}, "num_targets"),
    (MultiBlockSampler, {"target_scale": (0.7, 0.8), "num_targets": 60}, "num_targets"),
    (MultiBlockSampler, {"min_context": 0}, "min_context"),
    (MultiBlockSampler, {"min_context": 150}, "min_context"),
    (MultiBlockSampler, {"min_context": 150, "batching": "truncate"}, "min_context"),
    (MultiBlockSampler, {"target_scale": (0.5, 1.0), "num_targets": 1}, "target_scale"),
    (MultiBlockSampler, {"grid": (4, 4), "min_context": 10}, "min_context"),
    (MultiBlockSampler, {"grid": (6, 6), "batching": "truncate", "min_context": 30}, "min_context"),
    (
        MultiBlockSampler,
        {"context_scale": (0.2, 0.3), "target_scale": (0.3, 0.4), "batching": "truncate"},
        "target_scale",
    ),
    (BlockSampler, {"scale": 1.0}, "scale"),
    (BlockSampler, {"scale": 1.3}, "scale"),
    (BlockSampler, {"scale": -0.1}, "scale"),
    (RandomSampler, {"scale": 0.0}, "scale"),
    (RandomSampler, {"scale": 1.0}, "scale"),
]


@pytest.mark.parametrize(("sampler", "settings", "name"), REFUSED)
def test_refused_settings_come_with_one_that_works(sampler, settings, name):
    """The error names the value, and putting its advice in the value's place cures it."""
    settings = {"grid": (14, 14), **settings}
    with pytest.raises(ValueError) as error:
        sampler(**settings)
    message = str(error.value)
    assert message.startswith(f"{name}={settings[name]}: "), message
    advice = re.search(r"the nearest .*that will do: (.+)$", message).group(1)
    numbers = [float(number) for number in re.findall(r"[\d.]+", advice)]
    kind = int if name in ("grid", "num_targets", "min_context") else float
    value = tuple(map(kind, numbers))
    batch = sampler(**{**settings, name: value if len(value) > 1 else value[0]})(4)
    assert batch.batch_size == 4


def test_unknown_batching_lists_the_known():
    with pytest.raises(ValueError, match=r"one of \['packed', 'truncate'\], got 'dense'"):
        MultiBlockSampler((8, 8), batching="dense")


# ---- capacities --------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 8, 128])
@pytest.mark.parametrize(
    "sampler",
    [
        MultiBlockSampler((14, 14)),
        MultiBlockSampler((14, 14), batching="truncate"),
        RasterizedSampler((7, 7)),
        RandomSampler((14, 14)),
    ],
    ids=["packed", "truncate", "rasterized", "random"],
)
def test_planned_capacities_hold_batches(sampler, batch_size):
    capacities = plan_capacities(sampler, batch_size)
    assert capacities == plan_capacities(sampler, batch_size)
    assert 1 <= len(capacities) <= MAX_CAPACITIES
    bounds, most = sampler.max_seqlens, capacities[-1]
    assert most.context < batch_size * bounds.context + 64
    assert most.predictor < batch_size * bounds.predictor * sampler.num_targets + 64
    overflows = 0
    for seed in range(60):
        total = MaskSizes(*sampler.image_sizes(draw_keys(batch_size, seed)).sum(axis=0).tolist())
        overflows += not most.holds(total)
    assert overflows <= (3 if batch_size == 1 else 0)
    if isinstance(sampler, RandomSampler):  # every batch has the same size
        assert len(capacities) == 1


def test_capacities_save_padding():
    """Four capacities pad the predictor's rows by far less than the largest alone."""
    sampler = MultiBlockSampler((14, 14))
    sampler.capacities = plan_capacities(sampler, 32)
    padded, used = 0, 0
    for seed in range(100):
        packing = sampler(keys=draw_keys(32, seed)).predictor_packing
        padded += packing.capacity
        used += int(packing.cu_seqlens[-1])
    largest = 100 * sampler.capacities[-1].predictor
    assert (padded - used) < 0.4 * (largest - used)


def test_overflow_redraws_by_a_counter_and_drops_nothing():
    sampler = MultiBlockSampler((14, 14))
    exact = [sampler(keys=draw_keys(16, seed)) for seed in range(40)]
    totals = sorted(len(batch.predictor_packing.sequence_ids) for batch in exact)
    tight = MaskSizes(5000, 5000, totals[20], 5000)  # half of the batches overflow it
    limited = MultiBlockSampler((14, 14), capacities=[tight])
    redrawn = 0
    for seed, batch in enumerate(exact):
        masks = limited(keys=draw_keys(16, seed))
        again = limited(keys=draw_keys(16, seed))
        assert torch.equal(masks.context, again.context) and masks.redraws == again.redraws
        assert masks.predictor_packing.capacity == totals[20]
        overflows = len(batch.predictor_packing.sequence_ids) > totals[20]
        assert (masks.redraws > 0) == overflows
        context, targets = boolean_masks(masks)
        kept = 4 * context.sum() + targets.sum()
        assert kept == int(masks.predictor_packing.cu_seqlens[-1]) <= totals[20]
        if not overflows:
            assert torch.equal(masks.context[: len(batch.context)], batch.context)
        redrawn += overflows
    assert 10 < redrawn < 30


def test_masks_travel_as_one_tensor():
    masks = MultiBlockSampler((8, 8), capacities=64)(keys=derive_keys(4, np.arange(5)))
    block = masks._in_one_block()[1]
    copied = pickle.loads(pickle.dumps(masks))
    assert copied.grid == masks.grid and copied.context_packing.unique
    for tensor, copy in zip(tensors_of(masks), tensors_of(copied), strict=True):
        assert copy.dtype == tensor.dtype and torch.equal(copy, tensor)
        assert copy.data_ptr() % 16 == block.data_ptr() % 16
    assert {t.untyped_storage().data_ptr() for t in tensors_of(copied)} == {
        copied.context.data_ptr()
    }
    again = copied._in_one_block()[1]
    assert again.data_ptr() == copied.context.data_ptr() and torch.equal(again, block)
    assert copied.to("cpu") is copied
    assert tensors_of(masks.to("meta"))[-1].device.type == "meta"


def test_a_number_of_rows_pads_every_length_to_its_multiple():
    exact = MultiBlockSampler((14, 14))
    rounded = MultiBlockSampler((14, 14), capacities=64)
    keys = derive_keys(3, np.arange(9))
    found, expected = rounded(keys=keys), exact(keys=keys)
    for name in ("context", "targets", "target_union"):
        ids, plain = getattr(found, name), getattr(expected, name)
        assert len(ids) % 64 == 0 and 0 <= len(ids) - len(plain) < 64
        assert torch.equal(ids[: len(plain)], plain) and (ids[len(plain) :] == -1).all()
    assert found.predictor_packing.capacity % 64 == 0
    with pytest.raises(ValueError, match="capacities must be at least 1 row, got 0"):
        MultiBlockSampler((14, 14), capacities=0)


def test_capacities_that_hold_nothing_are_an_error():
    sampler = MultiBlockSampler((14, 14), capacities=[MaskSizes(64, 64, 64, 64)])
    with pytest.raises(ValueError, match="none of 21 draws of 8 images fits the capacities"):
        sampler(8)


@pytest.mark.parametrize(
    ("capacities", "message"),
    [
        ([], "1 to 4 capacities, got 0"),
        ([MaskSizes(i, i, i, i) for i in range(1, 6)], "1 to 4 capacities, got 5"),
        ([MaskSizes(9, 9, 9, 9), MaskSizes(10, 8, 10, 10)], "capacities must ascend"),
    ],
)
def test_bad_capacities(capacities, message):
    with pytest.raises(ValueError, match=message):
        MultiBlockSampler((8, 8), capacities=capacities)


# ---- masks given from outside ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "targets", "error", "message"),
    [
        ([0, 1], [[[2]]], ValueError, r"context must have shape \(B, K\), got \(2,\)"),
        ([[0, 1]], [[2, 3]], ValueError, r"targets must have shape \(B, M, K'\) with B=1"),
        ([[0, 1]], [[[2]], [[3]]], ValueError, r"with B=1, got \(2, 1, 1\)"),
        ([[0, 6]], [[[2]]], IndexError, r"context holds patch 6, outside 0..5"),
        ([[0, -2]], [[[2]]], IndexError, r"context holds patch -2, outside 0..5"),
        ([[0, 1]], [[[2, 7]]], IndexError, r"targets holds patch 7, outside 0..5"),
        ([[0, 1], [4, 4]], [[[2]], [[2]]], ValueError, "context holds patch 4 twice in sequence 1"),
        ([[0, 1]], [[[2, 3], [5, 5]]], ValueError, "targets holds patch 5 twice in sequence 1"),
    ],
)
def test_from_dense_checks_ids(context, targets, error, message):
    with pytest.raises(error, match=message):
        MaskBatch.from_dense(torch.tensor(context), torch.tensor(targets), (2, 3))


def test_from_lists_checks_counts():
    with pytest.raises(ValueError, match="2 contexts but targets of 1 images"):
        MaskBatch.from_lists([[0], [1]], [[[2]]], (2, 3))
    with pytest.raises(ValueError, match=r"as many target blocks, got \[1, 2\]"):
        MaskBatch.from_lists([[0], [1]], [[[2]], [[2], [3]]], (2, 3))
    with pytest.raises(ValueError, match="at least one image and one block"):
        MaskBatch.from_lists([[0]], [[]], (2, 3))
