"""Heat maps: numbers of patches as colours, alone or laid over their image."""

from __future__ import annotations

import numpy as np

# Dark blue, violet, red, orange, pale yellow: even steps of lightness, readable without colour.
_STOPS = np.array([[13, 8, 60], [90, 20, 120], [187, 55, 84], [249, 142, 9], [252, 255, 190]])


def heat_colours(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """(...) floats -> (..., 3) uint8, dark at `low` and below, light at `high` and above."""
    place = np.clip((values - low) / max(high - low, 1e-12), 0, 1) * (len(_STOPS) - 1)
    first = np.minimum(place.astype(int), len(_STOPS) - 2)
    share = (place - first)[..., None]
    return np.rint(_STOPS[first] * (1 - share) + _STOPS[first + 1] * share).astype(np.uint8)


def enlarged(cells: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(rows, columns, ...) -> (height, width, ...): every cell a rectangle of equal pixels."""
    height, width = shape[0] // cells.shape[0], shape[1] // cells.shape[1]
    return cells.repeat(height, axis=0).repeat(width, axis=1)


def laid_over(pixels: np.ndarray, colours: np.ndarray, strength: float = 0.65) -> np.ndarray:
    """Colours (H, W, 3) over the grey of an image (H, W, 3) uint8."""
    grey = pixels.mean(axis=2, keepdims=True)
    return np.rint(strength * colours + (1 - strength) * grey).astype(np.uint8)


def framed(
    pixels: np.ndarray, cells: np.ndarray, colour: tuple[int, int, int], width: int = 1
) -> np.ndarray:
    """The pixels (H, W, 3) with an outline, inside, around the true cells (rows, columns)."""
    inside = np.pad(enlarged(cells, pixels.shape[:2]), width)
    core = inside.copy()
    for axis in (0, 1):
        for step in range(1, width + 1):
            core &= np.roll(inside, step, axis) & np.roll(inside, -step, axis)
    edge = (inside & ~core)[width:-width, width:-width]
    out = pixels.copy()
    out[edge] = colour
    return out
