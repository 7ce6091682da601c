"""Multi-block masks as the released code distributes them, for parity runs.

What sets it apart from the paper and from this project's default:

- one size for all context blocks of a batch and one for all target blocks;
- a single number sets a target's scale and its aspect, so that large blocks are tall ones;
- the last row and column of the grid are never part of a block;
- contexts are cut to the shortest of the batch in raster order: the bottom of most images is lost.

A context block that keeps fewer than `min_context` patches is placed again. After every 20 places
one more target, the last first, no longer takes its patches out of the context: the two may then
overlap, as in the released code. That code goes on for ever where even an unconstrained block is
too small (4x4 and 6x6 grids); here the constructor asks that any context block less one target
suffices, so that 20 (M - 1) + 1 places always do.

The random stream is this project's own: the distribution is the released one, the masks of a given
seed are not.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from ijepa.counter_rng import derive_keys, random_bits
from ijepa.masks.blocks import choose_shapes, count_patches, place_blocks, shared_draw_shapes
from ijepa.masks.checks import check_count, check_grid, raise_scale_error
from ijepa.masks.sizes import MaskSizes

TRIES = 20  # places of a context block before one more target may overlap it
_DEFAULT_MIN_CONTEXT = 11  # the released code asks for more than 10
_STREAM_BATCH = 0x62617463


class TruncatedBlocks:
    """Blocks of one size a batch, contexts cut to one length; `MultiBlockSampler`'s arguments."""

    def __init__(self, grid, context_scale, target_scale, target_aspect, num_targets, min_context):
        self.grid = check_grid(grid, (2, 2), "blocks leave the last row and column free")
        self.num_targets = num_targets
        self._context_shapes = shared_draw_shapes(grid, context_scale, (1.0, 1.0))
        self._target_shapes = shared_draw_shapes(grid, target_scale, target_aspect)
        context_areas = self._context_shapes.prod(axis=1)
        context, target = int(context_areas.max()), int(self._target_shapes.prod(axis=1).max())
        smallest = int(context_areas.min())
        if target >= smallest:
            reason = "a target block may cover the context"
            shapes = partial(shared_draw_shapes, grid, aspect=target_aspect)
            raise_scale_error("target_scale", target_scale, shapes, smallest - 1, reason)
        self.min_context = self._checked_minimum(min_context, smallest, target)
        reachable = (grid[0] - 1) * (grid[1] - 1)
        self.max_seqlens = MaskSizes(
            context=context,
            targets=target,
            predictor=context + target,  # they may overlap
            target_union=min(num_targets * target, reachable),
        )

    def draw(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """(B,) keys -> context (B, rows, columns), targets (B, M, rows, columns), fallbacks."""
        batch_key = derive_keys(_STREAM_BATCH, keys.sum(keepdims=True))  # any order of images
        context_bits, target_bits = random_bits(batch_key, 2)[0]
        target_shape = choose_shapes(target_bits, self._target_shapes)
        place_bits = random_bits(keys, self.num_targets)
        targets = place_blocks(place_bits, *target_shape, self.grid, last_row_free=True)
        context_shape = choose_shapes(context_bits, self._context_shapes)
        context, fallbacks = self._place_context(keys, context_shape, targets)
        return _cut_to_shortest(context), targets, fallbacks

    def _place_context(
        self, keys: np.ndarray, shape: tuple[np.ndarray, np.ndarray], targets: np.ndarray
    ) -> tuple[np.ndarray, int]:
        """Context (B, rows, columns) bool less the targets, and how many images overlap some."""
        context = np.zeros((len(keys), *self.grid), dtype=bool)
        pending = np.arange(len(keys))
        fallbacks = 0
        for attempt in range(TRIES * (self.num_targets - 1) + 1):
            excluded = self.num_targets - attempt // TRIES
            if attempt == TRIES:
                fallbacks = pending.size
            bits = random_bits(keys[pending], 1, first=self.num_targets + attempt)[:, 0]
            block = place_blocks(bits, *shape, self.grid, last_row_free=True)
            block &= ~targets[pending, :excluded].any(axis=1)
            context[pending] = block
            pending = pending[count_patches(block) < self.min_context]
            if pending.size == 0:
                break
        return context, fallbacks

    @staticmethod
    def _checked_minimum(asked: int | None, smallest_context: int, largest_target: int) -> int:
        most = smallest_context - largest_target
        if asked is None:  # a quarter of the block, so that most places will do
            return min(_DEFAULT_MIN_CONTEXT, max(smallest_context // 4, 1), most)
        reason = f"a context block less a target may keep no more than {most} patches"
        return check_count("min_context", asked, 1, most, reason)


def _cut_to_shortest(context: np.ndarray) -> np.ndarray:
    """(B, rows, columns) bool with the first k patches of each image in raster order kept."""
    flat = context.reshape(len(context), -1)
    place = np.cumsum(flat, axis=1, dtype=np.int32)  # 1 for the first context patch
    return flat & (place <= count_patches(context).min())
