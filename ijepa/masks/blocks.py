"""Rectangular blocks of patches: their shapes for a scale and an aspect range, and their places.

One 64-bit draw makes one block: 12 bits choose its shape from a table, 26 its row, 26 its column.
The table quantises scale and aspect, so that the smallest and the largest block that a run can see
are known exactly when it starts: they become the `max_seqlen` of its packings.
"""

import numpy as np

_SHAPE_BITS = 12
_PLACE_BITS = np.uint64(26)
_PLACE_MASK = np.uint64((1 << 26) - 1)


def independent_shapes(
    grid: tuple[int, int], scale: tuple[float, float], aspect: tuple[float, float]
) -> np.ndarray:
    """Heights and widths with scale and aspect drawn each on its own, both uniformly.

    64 scales times 64 aspects, at the middles of equal intervals. Uniform in the aspect itself
    and not in its logarithm: that is the plain reading of the paper's "random aspect ratio in the
    range (0.75, 1.5)" (section 3) and how the released code draws it. A side that does not fit the
    grid is cut to it and the other grows to keep the area, so that a square context block of a
    wide grid still covers its share.

    Returns:
        (4096, 2) int64 (height, width), each from 1 to the grid's.
    """
    rows, columns = grid
    levels = 1 << (_SHAPE_BITS // 2)
    middles = (np.arange(levels) + 0.5) / levels
    area = rows * columns * (scale[0] + middles[:, None] * (scale[1] - scale[0]))
    area = np.maximum(area, 1.0)  # (64, 1)
    ratio = aspect[0] + middles * (aspect[1] - aspect[0])  # (64,)
    # Neither the height nor the width, area / height, leaves its 1 to rows or columns.
    height = np.clip(np.sqrt(area * ratio), np.maximum(area / columns, 1.0), np.minimum(area, rows))
    sides = np.stack([height, area / height], axis=-1)  # (64, 64, 2)
    return np.rint(sides).astype(np.int64).reshape(-1, 2)


def shared_draw_shapes(
    grid: tuple[int, int], scale: tuple[float, float], aspect: tuple[float, float]
) -> np.ndarray:
    """Heights and widths as the released code draws them: one number sets scale and aspect.

    A large block is therefore always a tall one. The area is cut to an int before the sides are
    rounded, and no side reaches the grid's: the last row and column stay free.

    Returns:
        (4096, 2) int64 (height, width), each from 1 to the grid's less 1.
    """
    rows, columns = grid
    draw = (np.arange(1 << _SHAPE_BITS) + 0.5) / (1 << _SHAPE_BITS)
    area = np.floor(rows * columns * (scale[0] + draw * (scale[1] - scale[0])))
    ratio = aspect[0] + draw * (aspect[1] - aspect[0])
    height = np.clip(np.rint(np.sqrt(area * ratio)), 1, rows - 1)
    width = np.clip(np.rint(np.sqrt(area / ratio)), 1, columns - 1)
    return np.stack([height, width], axis=-1).astype(np.int64)


def choose_shapes(bits: np.ndarray, shapes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint64 draws (...) -> heights and widths (...) from a table of 4096 shapes."""
    chosen = shapes[(bits >> np.uint64(64 - _SHAPE_BITS)).astype(np.int64)]
    return chosen[..., 0], chosen[..., 1]


def place_blocks(
    bits: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    grid: tuple[int, int],
    *,
    last_row_free: bool = False,
) -> np.ndarray:
    """Blocks at uniformly drawn places.

    Args:
        bits: (...) uint64 draws.
        heights, widths: (...) int64, or scalars.
        last_row_free: never touch the last row and column, as the released code (its heights and
            widths stay under the grid's).

    Returns:
        (..., rows, columns) bool.
    """
    places = 0 if last_row_free else 1
    rows, columns = grid
    top = _scaled(bits >> _PLACE_BITS, rows - heights + places)
    left = _scaled(bits, columns - widths + places)
    in_rows = _interval(top, heights, rows)
    in_columns = _interval(left, widths, columns)
    return in_rows[..., :, None] & in_columns[..., None, :]


def _scaled(bits: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The low 26 bits of each draw -> an int from 0 to count - 1."""
    low = (bits & _PLACE_MASK).astype(np.int64)
    return (low * count) >> np.int64(_PLACE_BITS)


def _interval(first: np.ndarray, length: np.ndarray, size: int) -> np.ndarray:
    """(...) -> (..., size) bool: first <= position < first + length."""
    positions = np.arange(size)
    first, length = np.asarray(first)[..., None], np.asarray(length)[..., None]
    return (positions >= first) & (positions < first + length)


def count_patches(masks: np.ndarray) -> np.ndarray:
    """(B, rows, columns) bool -> (B,) patches set."""
    return np.count_nonzero(masks, axis=(1, 2))
