"""Masks over random grids and settings, held against loops over images and blocks."""

import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ijepa.counter_rng import derive_keys
from ijepa.masks.batch import MaskBatch
from ijepa.masks.capacities import plan_capacities
from ijepa.masks.multiblock import MultiBlockSampler
from ijepa.masks.sampler import MaskSampler
from ijepa.masks.strategies import BlockSampler, RandomSampler, RasterizedSampler

GRIDS = st.tuples(st.integers(1, 18), st.integers(1, 18))
EXAMPLES = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much]
)


@st.composite
def ranges(draw, low: float, high: float) -> tuple[float, float]:
    first, second = draw(st.floats(low, high)), draw(st.floats(low, high))
    return min(first, second), max(first, second)


@st.composite
def samplers(draw) -> MaskSampler:
    """Any strategy on any grid; settings that the constructor refuses are left out."""
    grid = draw(GRIDS)
    strategy = draw(st.sampled_from(["packed", "packed", "truncate", "raster", "block", "random"]))
    try:
        if strategy == "raster":
            return RasterizedSampler(grid)
        if strategy == "block":
            return BlockSampler(grid, scale=draw(st.floats(0.05, 0.9)), aspect=draw(ranges(0.2, 4)))
        if strategy == "random":
            return RandomSampler(grid, scale=draw(st.floats(0.05, 0.95)))
        return MultiBlockSampler(
            grid,
            context_scale=draw(ranges(0.3, 1.0)),
            target_scale=draw(ranges(0.05, 0.4)),
            target_aspect=draw(ranges(0.3, 3.0)),
            num_targets=draw(st.integers(1, 6)),
            min_context=draw(st.none() | st.integers(1, 30)),
            batching=strategy,
        )
    except ValueError:
        assume(False)


def draw_keys(seed: int, count: int) -> np.ndarray:
    return derive_keys(seed, np.arange(count))


def ids_of(batch: MaskBatch) -> tuple[list[list[int]], list[list[list[int]]]]:
    images = range(batch.batch_size)
    context = [batch.context_of(image).tolist() for image in images]
    targets = [[ids.tolist() for ids in batch.targets_of(image)] for image in images]
    return context, targets


def padded(values: list, capacity: int) -> torch.Tensor:
    return torch.tensor(values + [-1] * (capacity - len(values)), dtype=torch.int64)


def assert_packed(batch: MaskBatch) -> None:
    """Every derived tensor of the batch against plain loops over its own context and targets."""
    context, targets = ids_of(batch)
    num_patches = batch.grid[0] * batch.grid[1]
    context_capacity, target_capacity = len(batch.context), len(batch.targets)
    flat_targets = [(b, ids) for b, blocks in enumerate(targets) for ids in blocks]
    all_context = [patch for ids in context for patch in ids]
    target_rows = [b * num_patches + patch for b, ids in flat_targets for patch in ids]
    union = sorted(set(target_rows))
    assert torch.equal(batch.context, padded(all_context, context_capacity))
    all_targets = [patch for _, ids in flat_targets for patch in ids]
    assert torch.equal(batch.targets, padded(all_targets, target_capacity))
    assert torch.equal(batch.target_rows, padded(target_rows, target_capacity))
    assert torch.equal(batch.target_union, padded(union, len(batch.target_union)))
    places = [union.index(row) for row in target_rows]
    assert torch.equal(batch.target_rows_in_union, padded(places, target_capacity))

    sources: list[int] = []
    sequence_of, copies, mask_rows = [], {}, []
    context_row = target_row = 0
    for b, blocks in enumerate(targets):
        for m, ids in enumerate(blocks):
            for k in range(len(context[b])):
                copies[context_row + k, m] = len(sources)
                sources.append(context_row + k)
            for k in range(len(ids)):
                mask_rows.append(len(sources))
                sources.append(context_capacity + target_row + k)
            sequence_of += [b * batch.num_targets + m] * (len(context[b]) + len(ids))
            target_row += len(ids)
        context_row += len(context[b])
    predictor = batch.predictor_packing
    assert torch.equal(predictor.source_rows, padded(sources, predictor.capacity))
    assert torch.equal(predictor.sequence_ids.long(), padded(sequence_of, predictor.capacity))
    assert torch.equal(batch.predictor_target_rows, padded(mask_rows, target_capacity))
    expected_copies = torch.full((context_capacity, batch.num_targets), -1)
    for place, row in copies.items():
        expected_copies[place] = row
    assert torch.equal(predictor.context_copies, expected_copies)

    assert batch.context_packing.num_sequences == len(context)
    assert batch.target_union_packing.num_sequences == len(context)
    for packing, lengths in (
        (batch.context_packing, [len(ids) for ids in context]),
        (batch.target_packing, [len(ids) for _, ids in flat_targets]),
        (predictor, [len(context[b]) + len(ids) for b, ids in flat_targets]),
        (batch.target_union_packing, [len({p for i in blocks for p in i}) for blocks in targets]),
    ):
        assert packing.cu_seqlens.diff().tolist() == lengths
        assert max(lengths) <= packing.max_seqlen
    assert batch.context_packing.unique and batch.target_union_packing.unique
    assert batch.target_packing.unique == (batch.num_targets == 1)
    assert batch.predictor_target_packing.unique and len(set(mask_rows)) == len(mask_rows)


@EXAMPLES
@given(samplers(), st.integers(0, 2**64 - 1), st.integers(1, 7))
def test_masks_are_valid(sampler, seed, batch_size):
    batch = sampler(keys=draw_keys(seed, batch_size))
    rows, columns = sampler.grid
    assert batch.grid == sampler.grid and batch.batch_size == batch_size
    assert batch.num_targets == sampler.num_targets
    context, targets = ids_of(batch)
    for ids, blocks in zip(context, targets, strict=True):
        for sequence in (ids, *blocks):
            assert sequence and sequence == sorted(set(sequence))
            assert sequence[0] >= 0 and sequence[-1] < rows * columns
        shared = set(ids) & {patch for block in blocks for patch in block}
        if sampler.couples_batch and batch.fallbacks:
            assert not set(ids) & set(blocks[0])  # the first block never overlaps
        else:
            assert not shared
        if isinstance(sampler, MultiBlockSampler):
            assert len(ids) >= sampler.min_context
    packings = batch.context_packing, batch.target_packing, batch.predictor_packing
    bounds = sampler.max_seqlens
    assert [p.max_seqlen for p in packings] == [bounds.context, bounds.targets, bounds.predictor]
    assert batch.target_union_packing.max_seqlen == bounds.target_union <= rows * columns


@EXAMPLES
@given(samplers(), st.integers(0, 2**64 - 1), st.integers(1, 6), st.booleans())
def test_packings_match_loops(sampler, seed, batch_size, with_capacities):
    if with_capacities:
        sampler.capacities = plan_capacities(sampler, batch_size)
    batch = sampler(keys=draw_keys(seed, batch_size))
    assert_packed(batch)
    if with_capacities:
        sizes = (len(batch.context), len(batch.targets), batch.predictor_packing.capacity)
        allowed = [(c.context, c.targets, c.predictor) for c in sampler.capacities]
        assert sizes in allowed and len(allowed) <= 4


@EXAMPLES
@given(samplers(), st.integers(0, 2**64 - 1), st.permutations(range(6)), st.integers(1, 6))
def test_key_fixes_the_masks(sampler, seed, order, taken):
    assume(not sampler.couples_batch)
    keys = draw_keys(seed, 6)
    context, targets = ids_of(sampler(keys=keys))
    chosen = np.array(order[:taken])
    other_context, other_targets = ids_of(sampler(keys=keys[chosen]))
    assert other_context == [context[image] for image in chosen]
    assert other_targets == [targets[image] for image in chosen]


@EXAMPLES
@given(
    grid=GRIDS,
    batch_size=st.integers(1, 4),
    num_targets=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_from_lists_and_dense_agree(grid, batch_size, num_targets, seed):
    """Ragged, unsorted, possibly empty sequences, given as lists and as -1 padded tensors."""
    rng = np.random.default_rng(seed)
    num_patches = grid[0] * grid[1]

    def sequence() -> list[int]:
        return rng.permutation(num_patches)[: rng.integers(0, num_patches + 1)].tolist()

    context = [sequence() for _ in range(batch_size)]
    targets = [[sequence() for _ in range(num_targets)] for _ in range(batch_size)]
    from_lists = MaskBatch.from_lists(context, targets, grid)
    assert ids_of(from_lists) == (context, targets)
    assert_packed(from_lists)

    dense_context = torch.stack([padded(ids, num_patches) for ids in context])
    dense_targets = torch.stack(
        [torch.stack([padded(ids, num_patches) for ids in blocks]) for blocks in targets]
    )
    from_dense = MaskBatch.from_dense(dense_context, dense_targets, grid)
    assert ids_of(from_dense) == (context, targets)
    assert_packed(from_dense)
    assert from_dense.context_packing.max_seqlen == num_patches  # the tensor's width


@pytest.mark.parametrize("batching", ["packed", "truncate"])
def test_samplers_and_batches_pickle(batching):
    sampler = MultiBlockSampler((8, 8), batching=batching)
    sampler.capacities = plan_capacities(sampler, 5)
    keys = draw_keys(3, 5)
    batch = sampler(keys=keys)
    same = pickle.loads(pickle.dumps(sampler))(keys=keys)
    assert ids_of(same) == ids_of(batch)
    buffer = io.BytesIO()
    torch.save(batch, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert ids_of(loaded) == ids_of(batch)
    assert_packed(loaded)


def test_to_moves_every_tensor():
    moved = MultiBlockSampler((8, 8))(3).to("meta")
    packings = (
        moved.context_packing,
        moved.target_packing,
        moved.predictor_packing,
        moved.target_union_packing,
    )
    owners = [vars(moved), *map(vars, packings)]
    tensors = [value for owner in owners for value in owner.values() if torch.is_tensor(value)]
    assert len(tensors) >= 5 + 4 * 3 + 3
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.grid == (8, 8) and moved.num_targets == 4
