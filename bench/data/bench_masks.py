"""Microseconds an image to draw a batch's masks and build every packing of them.

    pytest bench/data/bench_masks.py -s

The goal is at most 20 on a 14x14 grid at batch 256, drawing, context, target, predictor and union
packings included. The clock is the process's CPU time, as one thread does all the work: other load
on the machine then counts little. The median counts; the fastest round is shown beside it.
"""

import time

import numpy as np
import pytest

from ijepa.counter_rng import derive_keys
from ijepa.masks.capacities import plan_capacities
from ijepa.masks.multiblock import MultiBlockSampler
from ijepa.masks.strategies import BlockSampler, RandomSampler, RasterizedSampler

BATCH_SIZE = 256
SAMPLERS = {
    "multiblock 14x14": MultiBlockSampler((14, 14)),
    "multiblock 16x16": MultiBlockSampler((16, 16)),
    "multiblock 28x28": MultiBlockSampler((28, 28)),
    "truncate 14x14": MultiBlockSampler((14, 14), batching="truncate"),
    "rasterized 14x14": RasterizedSampler((14, 14)),
    "block 14x14": BlockSampler((14, 14)),
    "random 14x14": RandomSampler((14, 14)),
}


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("padded", [False, True], ids=["exact", "capacities"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_time_per_image(benchmark, name, padded):
    sampler = SAMPLERS[name]
    sampler.capacities = plan_capacities(sampler, BATCH_SIZE) if padded else None
    keys = derive_keys(0, np.arange(BATCH_SIZE))
    masks = benchmark(sampler, keys=keys)
    assert masks.batch_size == BATCH_SIZE
    median, fastest = (
        1e6 * seconds / BATCH_SIZE
        for seconds in (benchmark.stats.stats.median, benchmark.stats.stats.min)
    )
    benchmark.extra_info["microseconds_per_image"] = median
    lengths = "capacities" if padded else "exact"
    print(f"\n{name:18} {lengths:10} {median:6.1f} us an image (fastest {fastest:.1f})", end="")
