"""What every mask strategy shares: keys in, a packed `MaskBatch` out, capacities kept.

A sampler is stateless: the masks of an image are a function of its 64-bit key alone (a trainer
derives it from seed, epoch and sample index), so they do not depend on the batch, the worker or
the rank. It pickles, and the same instance may serve many workers.

A compiled step wants few distinct shapes. `plan_capacities` therefore fixes at most four padded
capacities from the sampler's own statistics, and a batch takes the first that holds it. A batch
over the largest is drawn again with keys derived by a counter; `MaskBatch.redraws` counts that, and
no token is ever dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NoReturn

import numpy as np
import torch
from masked_vit_kernels.packing import TILE

from ijepa.counter_rng import derive_keys
from ijepa.masks.batch import CapacityOverflow, MaskBatch, MaskSizes

MAX_CAPACITIES = 4
MAX_REDRAWS = 20
# Standard deviations above the mean at which capacities lie. With the four totals jointly normal,
# correlated as measured for the paper's settings on 14x14, the first three minimise the expected
# padding (1.44 deviations, against 6 with one capacity); past the last a batch is drawn again.
_CAPACITY_DEVIATIONS = (0.8, 1.5, 2.5, 6.0)
_STREAM_REDRAW = 0x6D61736B  # keeps redrawn keys apart from any other stream of the same key
_STREAM_PLAN = 0x706C616E
_PLAN_IMAGES = 4096
_PLAN_BATCHES = 64


class MaskSampler:
    """Base of the strategies: call it with a batch size or with keys.

    Args:
        grid: (rows, columns) of patches.
        max_seqlens: bounds of every sequence this sampler can draw: constants of the run.
        num_targets: M.
        capacities: padded lengths to choose from (see `plan_capacities`); a number of rows to whose
            multiples lengths are padded; None for exact lengths.
    """

    couples_batch = False  # whether an image's masks depend on the rest of its batch

    def __init__(
        self,
        grid: tuple[int, int],
        max_seqlens: MaskSizes,
        num_targets: int,
        capacities: Sequence[MaskSizes] | int | None = None,
    ):
        self.grid = grid
        self.max_seqlens = max_seqlens
        self.num_targets = num_targets
        self.capacities = capacities

    @property
    def capacities(self) -> tuple[MaskSizes, ...] | int | None:
        """Padded lengths in ascending order, rows to round up to, None for exact lengths."""
        return self._capacities

    @capacities.setter
    def capacities(self, capacities: Sequence[MaskSizes] | int | None) -> None:
        if isinstance(capacities, int):
            if capacities < 1:
                raise ValueError(f"capacities must be at least 1 row, got {capacities}")
        elif capacities is not None:
            capacities = tuple(capacities)
            if not 1 <= len(capacities) <= MAX_CAPACITIES:
                raise ValueError(f"1 to {MAX_CAPACITIES} capacities, got {len(capacities)}")
            for smaller, larger in pairwise(capacities):
                if not larger.holds(smaller):
                    raise ValueError(f"capacities must ascend, got {smaller} before {larger}")
        self._capacities = capacities

    def __call__(
        self,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
        *,
        keys: np.ndarray | None = None,
    ) -> MaskBatch:
        """Draw the masks of a batch.

        Args:
            batch_size: B, with keys drawn from `generator` (default: torch's own).
            keys: (B,) uint64, one an image, in place of a batch size.

        Raises:
            ValueError: neither or both of batch size and keys, or a batch that no capacity holds
                in any of 21 draws.
        """
        if (batch_size is None) == (keys is None):
            raise ValueError("give either batch_size or keys")
        keys = _draw_keys(batch_size, generator) if keys is None else _check_keys(keys)
        for redraws in range(MAX_REDRAWS + 1):
            drawn = keys if redraws == 0 else derive_keys(keys, _STREAM_REDRAW, redraws)
            context, targets, fallbacks = self._draw(drawn)
            try:
                return MaskBatch.from_boolean(
                    context,
                    targets,
                    self.grid,
                    max_seqlens=self.max_seqlens,
                    capacities=self._capacities,
                    redraws=redraws,
                    fallbacks=fallbacks,
                )
            except CapacityOverflow as error:
                overflow = error
        raise ValueError(
            f"none of {MAX_REDRAWS + 1} draws of {len(keys)} images fits the capacities: "
            f"{overflow}; plan them for at least this batch size"
        )

    def _draw(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """(B,) keys -> context (B, N) bool, targets (B, M, N) bool, images that fell back."""
        raise NotImplementedError

    def image_sizes(self, keys: np.ndarray) -> np.ndarray:
        """(B,) keys -> (B, 4) tokens an image adds to context, targets, predictor and union."""
        context, targets, _ = self._draw(keys)
        context_sizes = np.count_nonzero(context, axis=1)
        target_sizes = np.count_nonzero(targets, axis=(1, 2))
        union_sizes = np.count_nonzero(targets.any(axis=1), axis=1)
        predictor_sizes = self.num_targets * context_sizes + target_sizes
        return np.stack([context_sizes, target_sizes, predictor_sizes, union_sizes], axis=1)


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


def _draw_keys(batch_size: int, generator: torch.Generator | None) -> np.ndarray:
    """(B,) uint64 keys from a torch generator, anywhere in int64's range."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    device = "cpu" if generator is None else generator.device
    bounds = torch.iinfo(torch.int64)
    keys = torch.randint(bounds.min, bounds.max, (batch_size,), generator=generator, device=device)
    return keys.cpu().numpy().view(np.uint64)


def _check_keys(keys: np.ndarray) -> np.ndarray:
    keys = np.asarray(keys)
    if keys.ndim != 1 or keys.size == 0 or keys.dtype != np.uint64:
        raise ValueError(f"keys must be uint64 of shape (B,), got {keys.dtype} {keys.shape}")
    return keys


def check_grid(grid: Sequence[int], smallest: tuple[int, int], reason: str) -> tuple[int, int]:
    """The grid as a tuple of ints, or ValueError with the nearest one that will do."""
    rows, columns = grid
    nearest = (max(int(rows), smallest[0]), max(int(columns), smallest[1]))
    if nearest[0] * nearest[1] < 2:
        nearest = (1, 2)
    if (rows, columns) != nearest:
        raise ValueError(f"grid={tuple(grid)}: {reason}; the nearest grid that will do: {nearest}")
    return nearest


def check_range(name: str, value: Sequence[float], most: float) -> tuple[float, float]:
    """A (low, high) with 0 < low <= high <= most, or ValueError with the nearest such pair."""
    low, high = (float(bound) for bound in value)
    if 0 < low <= high <= most:
        return low, high
    low, high = sorted((low, high))
    positive = [min(bound, most) for bound in (low, high) if bound > 0] or [most]
    raise ValueError(
        f"{name}={tuple(value)}: expected 0 < low <= high"
        f"{f' <= {most:g}' if np.isfinite(most) else ''}; "
        f"the nearest range that will do: {(positive[0], positive[-1])}"
    )


def check_count(name: str, value: int, least: int, most: int | None, reason: str) -> int:
    """An int within [least, most], or ValueError with the nearest one."""
    nearest = max(least, int(value) if most is None else min(int(value), most))
    if value != nearest:
        raise ValueError(f"{name}={value}: {reason}; the nearest value that will do: {nearest}")
    return nearest


def raise_scale_error(
    name: str,
    scale: float | tuple[float, float],
    make_shapes: Callable[..., np.ndarray],
    most: int,
    reason: str,
) -> NoReturn:
    """ValueError with the nearest scale none of whose blocks has more than `most` patches.

    Args:
        make_shapes: `make_shapes(scale=(low, high))` -> (4096, 2) heights and widths.
    """
    low, high = scale if isinstance(scale, tuple) else (scale, scale)
    for permille in range(math.floor(1000 * high), 0, -1):
        candidate = (min(low, permille / 1000), permille / 1000)
        if make_shapes(scale=candidate).prod(axis=1).max() <= most:
            nearest = candidate if isinstance(scale, tuple) else candidate[1]
            raise ValueError(f"{name}={scale}: {reason}; the nearest that will do: {nearest}")
    raise ValueError(f"{name}={scale}: {reason}, and so may any smaller one; take a larger grid")
