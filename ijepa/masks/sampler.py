"""What every mask strategy shares: keys in, a packed `MaskBatch` out, capacities kept.

An image whose draws leave too little context gets a stated fallback (`fallback.py`).

A sampler is stateless: the masks of an image are a function of its 64-bit key alone (a trainer
derives it from seed, epoch and sample index), so they do not depend on the batch, the worker or
the rank. It pickles, and the same instance may serve many workers.

A compiled step wants few distinct shapes. `capacities.py` therefore fixes at most four padded
capacities from the sampler's own statistics, and a batch takes the first that holds it. A batch
over the largest is drawn again with keys derived by a counter; `MaskBatch.redraws` counts that, and
no token is ever dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from ijepa.counter_rng import derive_keys
from ijepa.masks.batch import MaskBatch
from ijepa.masks.sizes import CapacityOverflow, MaskSizes

MAX_CAPACITIES = 4
MAX_REDRAWS = 20
_STREAM_REDRAW = 0x6D61736B  # keeps redrawn keys apart from any other stream of the same key


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
        if keys is not None and batch_size is None:
            keys = _check_keys(keys)
        elif batch_size is not None and keys is None:
            keys = _draw_keys(batch_size, generator)
        else:
            raise ValueError("give either batch_size or keys")
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
