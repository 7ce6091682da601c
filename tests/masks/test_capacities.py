"""Padded lengths: planned, kept, overflowed; masks as one tensor."""

import pickle

import numpy as np
import pytest
import torch
from mask_checks import boolean_masks, draw_keys

from ijepa.counter_rng import derive_keys
from ijepa.masks.capacities import plan_capacities
from ijepa.masks.layout import tensors_of
from ijepa.masks.multiblock import MultiBlockSampler
from ijepa.masks.sampler import MAX_CAPACITIES
from ijepa.masks.sizes import MaskSizes
from ijepa.masks.strategies import RandomSampler, RasterizedSampler


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
