"""The loader: batches are a function of the step, whatever workers, ranks and interruptions."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from ijepa.counter_rng import random_bits
from ijepa.data import ArraySource, RandomResizedCrop, Squash, build_loader

COUNT, BATCH, SEED = 50, 4, 7
TRANSFORM = RandomResizedCrop((8, 8), flip=True)


@dataclass(frozen=True)
class StubMasks:
    """What the loader needs of a MaskBatch: tensors that travel."""

    draws: torch.Tensor  # (B, 3)

    def __eq__(self, other):
        return torch.equal(self.draws, other.draws)


def sample_masks(*, keys: np.ndarray) -> StubMasks:
    assert keys.dtype == np.uint64
    return StubMasks(torch.from_numpy(random_bits(keys, 3).astype(np.int64)))


@pytest.fixture(scope="module")
def source() -> ArraySource:
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 12, 10, 3), dtype=np.uint8)
    return ArraySource(
        images, {"number": np.arange(COUNT)}, {"number": list(map(str, range(COUNT)))}
    )


def steps(source, end=30, transform=TRANSFORM, **options):
    options = {"batch_size": BATCH, "seed": SEED, "end_step": end} | options
    return list(build_loader(source, sample_masks, transform, **options))


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.step == b.step and a.masks == b.masks
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels["number"], b.labels["number"])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(source, workers):
    assert_same(steps(source), steps(source, num_workers=workers))


@pytest.mark.parametrize("start", [1, 11, 12, 29])
@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_at_a_step_continues_exactly(source, start, workers):
    assert_same(steps(source)[start:], steps(source, start_step=start, num_workers=workers))


@pytest.mark.parametrize("ranks, accumulate", [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_ranks_and_micro_batches_share_the_global_batch(source, ranks, accumulate):
    whole = steps(source, batch_size=8, end=12)
    small = 8 // (ranks * accumulate)
    shares = [
        steps(source, batch_size=small, world_size=ranks, rank=rank, accumulate=accumulate, end=12)
        for rank in range(ranks)
    ]
    for step, batch in enumerate(whole):
        parts = [share[step * accumulate + part] for share in shares for part in range(accumulate)]
        assert {part.step for part in parts} == {step}
        assert torch.equal(batch.images, torch.cat([part.images for part in parts]))
        assert torch.equal(batch.masks.draws, torch.cat([part.masks.draws for part in parts]))


def test_an_epoch_shows_every_image_once(source):
    loader = build_loader(source, sample_masks, TRANSFORM, batch_size=BATCH, seed=SEED, end_step=36)
    assert loader.steps_per_epoch == 12
    batches = list(loader)
    orders = [
        torch.cat([batch.labels["number"] for batch in batches[12 * epoch : 12 * epoch + 12]])
        for epoch in range(3)
    ]
    for order in orders:
        assert len(order.unique()) == 48  # the last two sit the epoch out
    assert not torch.equal(orders[0], orders[1])
    left_out = [set(range(COUNT)) - set(order.tolist()) for order in orders]
    assert len(set(map(frozenset, left_out))) > 1


def test_crops_and_masks_change_from_epoch_to_epoch_and_seed_to_seed(source):
    def by_number(batches):
        return {
            int(number): (image, mask)
            for batch in batches
            for number, image, mask in zip(
                batch.labels["number"], batch.images, batch.masks.draws, strict=True
            )
        }

    first, second = by_number(steps(source, end=12)), by_number(steps(source, end=24)[12:])
    other = by_number(steps(source, end=12, seed=SEED + 1))
    for changed in (second, other):
        common = first.keys() & changed.keys()
        assert len(common) > 40
        assert not any(torch.equal(first[n][1], changed[n][1]) for n in common)
        assert np.mean([torch.equal(first[n][0], changed[n][0]) for n in common]) < 0.2


def test_images_go_with_their_labels(source):
    for batch in steps(source, end=3, transform=Squash((12, 10))):
        for image, number in zip(batch.images, batch.labels["number"], strict=True):
            assert torch.equal(image, torch.from_numpy(source.images[number]).permute(2, 0, 1))


def test_the_global_generator_is_left_alone(source):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    steps(source, end=2, num_workers=2)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_a_worker_reach_the_caller(source, workers):
    def broken(*, keys):
        raise RuntimeError("no masks today")

    loader = build_loader(source, broken, TRANSFORM, batch_size=4, seed=0, num_workers=workers)
    with pytest.raises(RuntimeError, match="no masks today"):
        next(iter(loader))


def test_workers_are_single_threaded_and_deaf_to_signals(source):
    def nosy(*, keys):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return StubMasks(torch.tensor([torch.get_num_threads()]))

    loader = build_loader(source, nosy, TRANSFORM, batch_size=4, seed=0, num_workers=1, end_step=3)
    assert [batch.masks.draws.item() for batch in loader] == [1, 1, 1]


def test_an_unfinished_iterator_does_not_keep_the_process(source):
    """At exit multiprocessing sends SIGTERM to the workers and waits for them."""
    script = """
import numpy as np
from ijepa.data import ArraySource, Squash, build_loader
source = ArraySource(np.zeros((8, 4, 4, 3), dtype=np.uint8))
loader = build_loader(
    source, lambda *, keys: None, Squash((4, 4)), batch_size=2, seed=0, num_workers=2
)
batches = iter(loader)
print(next(batches).step)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stdout == b"0\n", done.stderr.decode()


def test_endless_without_an_end_step(source):
    loader = build_loader(source, sample_masks, TRANSFORM, batch_size=BATCH, seed=SEED)
    batches = iter(loader)
    assert [next(batches).step for _ in range(40)] == list(range(40))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 51}, "has 50 images.*lower batch_size to at most 50"),
        ({"batch_size": 26, "world_size": 2}, "lower batch_size to at most 25"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, 2\)"),
        ({"num_workers": -1}, "at least 0"),
    ],
)
def test_bad_settings_are_errors(source, options, message):
    with pytest.raises(ValueError, match=message):
        steps(source, **options)
