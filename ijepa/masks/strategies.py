"""The other mask strategies of the paper's ablation (Table 6): rasterized, block and random.

In all three the context is what the target leaves, or one quadrant, so that context and targets
never share a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from ijepa.counter_rng import random_bits
from ijepa.masks.blocks import choose_shapes, independent_shapes, place_blocks
from ijepa.masks.checks import check_grid, check_range, raise_scale_error
from ijepa.masks.sampler import MaskSampler
from ijepa.masks.sizes import MaskSizes


class RasterizedSampler(MaskSampler):
    """One quadrant of the grid, drawn uniformly, predicts each of the other three (M = 3).

    An odd side is halved with the smaller part first.

    Raises:
        ValueError: a grid with fewer than two rows or columns.
    """

    def __init__(
        self, grid: tuple[int, int], *, capacities: Sequence[MaskSizes] | int | None = None
    ):
        grid = check_grid(grid, (2, 2), "quadrants need two rows and two columns")
        rows, columns = np.indices(grid)
        quadrant = 2 * (rows >= grid[0] // 2) + (columns >= grid[1] // 2)
        self._quadrants = quadrant.reshape(1, -1) == np.arange(4)[:, None]  # (4, N)
        sizes = np.sort(self._quadrants.sum(axis=1))
        largest, second = int(sizes[-1]), int(sizes[-2])
        bounds = MaskSizes(
            context=largest,
            targets=largest,
            predictor=largest + second,
            target_union=int(sizes[1:].sum()),
        )
        super().__init__(grid, bounds, num_targets=3, capacities=capacities)

    def _draw(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        chosen = (random_bits(keys, 1)[:, 0] >> np.uint64(62)).astype(np.int64)  # (B,)
        others = np.array([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])[chosen]  # (B, 3)
        return self._quadrants[chosen], self._quadrants[others], 0


class BlockSampler(MaskSampler):
    """One large block is the target, its complement the context (M = 1).

    Args:
        grid: (rows, columns) of patches.
        scale: the block's share of the grid.
        aspect: range of its height over its width. The paper gives none; the default is that of
            the multi-block targets.

    Raises:
        ValueError: a scale whose block leaves no context, with the nearest that does.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        *,
        scale: float = 0.6,
        aspect: tuple[float, float] = (0.75, 1.5),
        capacities: Sequence[MaskSizes] | int | None = None,
    ):
        grid = check_grid(grid, (1, 1), "context and target need a patch each")
        aspect = check_range("aspect", aspect, float("inf"))
        num_patches = grid[0] * grid[1]
        if scale <= 0:
            nearest = 1 / num_patches
            raise ValueError(
                f"scale={scale}: expected over 0; the nearest that will do: {nearest:.4g}"
            )
        self._shapes = independent_shapes(grid, (scale, scale), aspect)
        areas = self._shapes.prod(axis=1)
        if areas.max() >= num_patches:
            reason = "a block may cover the grid and leave no context"
            shapes = partial(independent_shapes, grid, aspect=aspect)
            raise_scale_error("scale", scale, shapes, num_patches - 1, reason)
        bounds = MaskSizes(
            context=num_patches - int(areas.min()),
            targets=int(areas.max()),
            predictor=num_patches,
            target_union=int(areas.max()),
        )
        super().__init__(grid, bounds, num_targets=1, capacities=capacities)

    def _draw(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        bits = random_bits(keys, 1)[:, 0]
        block = place_blocks(bits, *choose_shapes(bits, self._shapes), self.grid)
        target = block.reshape(len(keys), -1)
        return ~target, target[:, None], 0


class RandomSampler(MaskSampler):
    """A fixed number of patches drawn without replacement is the target, the rest the context.

    Args:
        grid: (rows, columns) of patches.
        scale: share of the patches that are targets, rounded to whole patches (M = 1).

    Raises:
        ValueError: a scale that leaves no target or no context, with the nearest that does.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        *,
        scale: float = 0.6,
        capacities: Sequence[MaskSizes] | int | None = None,
    ):
        grid = check_grid(grid, (1, 1), "context and target need a patch each")
        num_patches = grid[0] * grid[1]
        self._count = round(scale * num_patches)
        nearest = min(max(self._count, 1), num_patches - 1)
        if self._count != nearest:
            raise ValueError(
                f"scale={scale}: expected 1 to {num_patches - 1} target patches, got {self._count};"
                f" the nearest scale that will do: {nearest / num_patches:.4g}"
            )
        bounds = MaskSizes(
            context=num_patches - self._count,
            targets=self._count,
            predictor=num_patches,
            target_union=self._count,
        )
        super().__init__(grid, bounds, num_targets=1, capacities=capacities)

    def _draw(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        order = random_bits(keys, self.grid[0] * self.grid[1]).argpartition(self._count - 1, axis=1)
        target = np.zeros(order.shape, dtype=bool)
        np.put_along_axis(target, order[:, : self._count], True, axis=1)
        return ~target, target[:, None], 0
