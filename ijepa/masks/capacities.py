"""The padded lengths of a run: at most four for each kind of sequence, from simulated masks."""

from __future__ import annotations

import numpy as np
from masked_vit_kernels.packing import TILE

from ijepa.counter_rng import derive_keys
from ijepa.masks.sampler import MaskSampler
from ijepa.masks.sizes import MaskSizes

# Standard deviations above the mean at which capacities lie. With the four totals jointly normal,
# correlated as measured for the paper's settings on 14x14, the first three minimise the expected
# padding (1.44 deviations, against 6 with one capacity); past the last a batch is drawn again.
_CAPACITY_DEVIATIONS = (0.8, 1.5, 2.5, 6.0)
_STREAM_PLAN = 0x706C616E
_PLAN_IMAGES = 4096
_PLAN_BATCHES = 64


def plan_capacities(sampler: MaskSampler, batch_size: int) -> tuple[MaskSizes, ...]:
    """At most four padded capacities for batches of `batch_size`, from simulated masks.

    Fixed keys: the same sampler and batch size always give the same capacities. The last lies six
    standard deviations over the mean, or at what a batch can hold at most where that is less; the
    others are where they save most. Smaller batches fit too. Rounded up to whole tiles.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    mean, deviation = _batch_statistics(sampler, batch_size)
    bounds, blocks = sampler.max_seqlens, sampler.num_targets
    most = batch_size * np.array(
        [bounds.context, bounds.targets * blocks, bounds.predictor * blocks, bounds.target_union]
    )
    levels = []
    for deviations in _CAPACITY_DEVIATIONS:
        size = np.minimum(np.ceil(mean + deviations * deviation), most)
        level = MaskSizes(*(int(-(-tokens // TILE) * TILE) for tokens in size))
        if level not in levels:
            levels.append(level)
    return tuple(levels)


def _batch_statistics(sampler: MaskSampler, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (4,) of a batch's total tokens, from fixed keys."""
    chunk = batch_size if sampler.couples_batch else _PLAN_IMAGES // _PLAN_BATCHES
    sizes = [  # _PLAN_BATCHES arrays (chunk, 4)
        sampler.image_sizes(derive_keys(_STREAM_PLAN, batch, np.arange(chunk)))
        for batch in range(_PLAN_BATCHES)
    ]
    if sampler.couples_batch:
        totals = np.stack([batch.sum(axis=0) for batch in sizes])
        return totals.mean(axis=0), totals.std(axis=0)
    images = np.concatenate(sizes)
    return images.mean(axis=0) * batch_size, images.std(axis=0) * batch_size**0.5
