"""Settings of masks that are refused: what was expected, and the nearest that will do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np


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
