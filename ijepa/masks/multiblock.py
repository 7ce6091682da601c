"""The multi-block masks of I-JEPA (paper section 3 and appendix A.1).

M possibly overlapping target blocks and one large context block are drawn for every image; patches
of the targets are taken out of the context. Drawing is vectorised over the batch: no loop runs over
images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np

from ijepa.counter_rng import derive_keys, random_bits
from ijepa.masks.blocks import choose_shapes, count_patches, independent_shapes, place_blocks
from ijepa.masks.checks import check_count, check_grid, check_range, raise_scale_error
from ijepa.masks.fallback import DRAWS, MAX_FALLBACK_SHARE, fallback_masks
from ijepa.masks.sampler import MaskSampler
from ijepa.masks.sizes import MaskSizes
from ijepa.masks.truncated import TruncatedBlocks

_DEFAULT_MIN_CONTEXT = 10
_ATTEMPT_STRIDE = 1 << 32  # random numbers set aside for one draw of an image
_TRIAL_IMAGES = 256
_STREAM_TRIAL = 0x74726961


class MultiBlockSampler(MaskSampler):
    """Target blocks, and a context block less the targets.

    `batching="packed"`: every block of every image has a scale and an aspect of its own, each drawn
    uniformly, and may lie anywhere. An image whose context keeps fewer than `min_context` patches
    is drawn again, at most 8 times in all. Then the fallback: its M target blocks all take the
    place of the first and its context is the largest block of the settings less that one, which
    the constructor checks to be enough. Settings that would send more than 5 % of the images there
    are refused.

    `batching="truncate"`: the distribution of the released code, for parity runs; see
    `ijepa.masks.truncated`. Here an image's masks depend on its batch.

    `MaskBatch.fallbacks` counts the images of either fallback.

    Args:
        grid: (rows, columns) of patches.
        context_scale: range of the context block's share of the grid; its aspect is 1.
        target_scale: range of a target block's share.
        target_aspect: range of a target block's height over its width.
        num_targets: M.
        min_context: fewest context patches of an image. Default: 10 ("packed") or 11 ("truncate",
            whose original asks for more than 10), on small grids less: what 95 % of the first
            draws leave ("packed") or a quarter of the context block ("truncate").
        batching: "packed" or "truncate".
        capacities: padded lengths, as of `MaskSampler`.

    Raises:
        ValueError: settings that cannot be satisfied, with the nearest that can.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        *,
        context_scale: tuple[float, float] = (0.85, 1.0),
        target_scale: tuple[float, float] = (0.15, 0.2),
        target_aspect: tuple[float, float] = (0.75, 1.5),
        num_targets: int = 4,
        min_context: int | None = None,
        batching: Literal["packed", "truncate"] = "packed",
        capacities: Sequence[MaskSizes] | int | None = None,
    ):
        strategies: dict[str, type[PackedBlocks] | type[TruncatedBlocks]] = {
            "packed": PackedBlocks,
            "truncate": TruncatedBlocks,
        }
        if batching not in strategies:
            raise ValueError(f"batching must be one of {sorted(strategies)}, got {batching!r}")
        self.batching = batching
        self.couples_batch = batching == "truncate"
        self._blocks = strategies[batching](
            check_grid(grid, (1, 1), "context and target need a patch each"),
            check_range("context_scale", context_scale, 1.0),
            check_range("target_scale", target_scale, 1.0),
            check_range("target_aspect", target_aspect, math.inf),
            check_count("num_targets", num_targets, 1, None, "at least one block to predict"),
            min_context,
        )
        self.min_context = self._blocks.min_context
        super().__init__(self._blocks.grid, self._blocks.max_seqlens, num_targets, capacities)

    def _draw(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        context, targets, fallbacks = self._blocks.draw(keys)
        images, num_patches = len(keys), self.grid[0] * self.grid[1]
        return (
            context.reshape(images, num_patches),
            targets.reshape(images, self.num_targets, num_patches),
            fallbacks,
        )


class PackedBlocks:
    """Blocks of any size at any place, every image for itself."""

    def __init__(self, grid, context_scale, target_scale, target_aspect, num_targets, min_context):
        self.grid, self.num_targets = grid, num_targets
        self._context_shapes = independent_shapes(grid, context_scale, (1.0, 1.0))
        self._target_shapes = independent_shapes(grid, target_scale, target_aspect)
        self._largest_context = self._context_shapes[self._context_shapes.prod(axis=1).argmax()]
        areas = self._target_shapes.prod(axis=1)
        self.min_context = self._checked_minimum(min_context, target_scale, target_aspect)

        num_patches = grid[0] * grid[1]
        context = min(int(self._largest_context.prod()), num_patches - int(areas.min()))
        target = int(areas.max())
        self.max_seqlens = MaskSizes(
            context=context,
            targets=target,
            predictor=min(context + target, num_patches),  # an image's share no patch
            target_union=min(num_targets * target, num_patches - self.min_context),
        )

    def draw(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """(B,) keys -> context (B, rows, columns), targets (B, M, rows, columns), fallbacks."""
        context, targets = self._attempt(keys, 0)
        short = np.flatnonzero(count_patches(context) < self.min_context)
        for attempt in range(1, DRAWS):
            if short.size == 0:
                return context, targets, 0
            context[short], targets[short] = self._attempt(keys[short], attempt)
            short = short[count_patches(context[short]) < self.min_context]
        bits = random_bits(keys[short], 1, first=DRAWS * _ATTEMPT_STRIDE)[:, 0]
        context[short], targets[short] = fallback_masks(
            bits, targets[short], self._largest_context, self.grid
        )
        return context, targets, short.size

    def _attempt(self, keys: np.ndarray, attempt: int) -> tuple[np.ndarray, np.ndarray]:
        """Context (B, rows, columns) and targets (B, M, rows, columns) of one draw, bool."""
        bits = random_bits(keys, self.num_targets + 1, first=attempt * _ATTEMPT_STRIDE)
        targets = self._place(bits[:, 1:], self._target_shapes)
        return self._place(bits[:, 0], self._context_shapes) & ~targets.any(axis=1), targets

    def _place(self, bits: np.ndarray, shapes: np.ndarray) -> np.ndarray:
        """(...) draws -> (..., rows, columns) bool."""
        return place_blocks(bits, *choose_shapes(bits, shapes), self.grid)

    def _checked_minimum(self, asked: int | None, target_scale, target_aspect) -> int:
        """`min_context`, if the fallback can keep it and few images need the fallback."""
        largest_context = int(self._largest_context.prod())
        largest_target = int(self._target_shapes.prod(axis=1).max())
        if largest_target >= largest_context:
            reason = "a target block may cover the context"
            shapes = partial(independent_shapes, self.grid, aspect=target_aspect)
            raise_scale_error("target_scale", target_scale, shapes, largest_context - 1, reason)
        first_draw, best_draw = self._trial()
        check_count(
            "num_targets",
            self.num_targets,
            1,
            max(int((best_draw > 0).sum()), 1),
            f"so many blocks of target_scale={target_scale} leave no context",
        )
        if asked is None:
            return min(_DEFAULT_MIN_CONTEXT, max(int(first_draw[-1]), 1))
        most = max(min(int(best_draw[-1]), largest_context - largest_target), 1)
        share = f"{1 - MAX_FALLBACK_SHARE:.0%} of the images reach in {DRAWS} draws"
        return check_count("min_context", asked, 1, most, f"expected 1 to {most}, what {share}")

    def _trial(self) -> tuple[np.ndarray, np.ndarray]:
        """The context 95 % of trial images reach with the first 1 to min(M, N) targets.

        In the first draw, and in the best of all draws: two arrays of min(M, N).
        """
        blocks = min(self.num_targets, math.prod(self.grid))
        keys = derive_keys(_STREAM_TRIAL, np.arange(_TRIAL_IMAGES))
        sizes = np.zeros((DRAWS, _TRIAL_IMAGES, blocks), dtype=np.int64)
        for attempt in range(DRAWS):
            bits = random_bits(keys, blocks + 1, first=attempt * _ATTEMPT_STRIDE)
            left = self._place(bits[:, 0], self._context_shapes)
            for block in range(blocks):  # one at a time: there may be very many
                left &= ~self._place(bits[:, 1 + block], self._target_shapes)
                sizes[attempt, :, block] = count_patches(left)
        short_images = int(MAX_FALLBACK_SHARE * _TRIAL_IMAGES)
        first, best = np.sort(sizes[0], axis=0), np.sort(sizes.max(axis=0), axis=0)
        return first[short_images], best[short_images]
