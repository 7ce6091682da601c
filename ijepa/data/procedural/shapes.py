"""`shapes`: one of ten procedural shapes per image.

Colours, gradients, rotation, place, size and noise are drawn without regard to the class, and the
shapes of all classes cover the same area, so that nothing about the colours of an image, neither
their mean nor their histogram, says which shape it shows. A shape is lighter than its ground: with
either polarity a network has to find edges irrespective of their sign before it can find shapes,
and small ones spend most of a short run on that.
"""

from __future__ import annotations

import math

import numpy as np

from ijepa.counter_rng import derive_keys, random_bits, uniform

NAMES = ("disc", "ring", "square", "frame", "triangle", "star", "cross", "moon", "bars", "dots")
VERSION = 2
_STREAM = 101
_SUPERSAMPLING = 4  # subpixels a side
_CANDIDATES = 8  # foreground colours tried for enough contrast
_CONTRAST = 0.3  # least difference of the two colours' luma
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def shape_labels(indices: np.ndarray, size: tuple[int, int], seed: int) -> dict[str, np.ndarray]:
    """Task "shape" -> (n,) int64: the classes follow each other, so any stretch is balanced."""
    return {"shape": np.asarray(indices, dtype=np.int64) % len(NAMES)}


def render_shapes(indices: np.ndarray, size: tuple[int, int], seed: int) -> np.ndarray:
    """Images `indices` (n,) of data set `seed`: (n, height, width, 3) uint8."""
    indices = np.asarray(indices, dtype=np.int64)
    keys = derive_keys(seed, _STREAM, indices)
    draws = uniform(keys, 16 + 3 * _CANDIDATES).astype(np.float32)
    coverage = _coverage(indices % len(NAMES), draws[:, :4], size)[..., None]  # (n, H, W, 1)
    background, foreground = _colours(draws[:, 4:10], draws[:, 10:13], draws[:, 16:])
    ground = _gradient(background, draws[:, 13], size)
    shape = _gradient(foreground, draws[:, 14], size)
    image = ground + coverage * (shape - ground)
    strength = 0.01 + 0.03 * draws[:, 15]
    image += strength[:, None, None, None] * _noise(keys, image.shape[1:])
    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)


def _coverage(classes: np.ndarray, draws: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Share of each pixel inside the shape: (n,), (n, 4) -> (n, H, W) float32."""
    height, width = size
    shorter = min(size)
    radius = shorter * (0.18 + 0.1 * draws[:, 0])  # of the disc; the others have its area
    centre_y = height / 2 + 0.35 * height * (draws[:, 1] - 0.5)
    centre_x = width / 2 + 0.35 * width * (draws[:, 2] - 0.5)
    angle = 2 * math.pi * draws[:, 3]
    step = np.float32(1 / _SUPERSAMPLING)
    rows = (np.arange(height * _SUPERSAMPLING, dtype=np.float32) + 0.5) * step
    columns = (np.arange(width * _SUPERSAMPLING, dtype=np.float32) + 0.5) * step

    coverage = np.empty((len(classes), height, width), dtype=np.float32)
    for number, name in enumerate(NAMES):
        members = np.flatnonzero(classes == number)
        if not len(members):
            continue
        scale = 1 / (radius[members] * _AREA_SCALE[name])
        cosine = (np.cos(angle[members]) * scale)[:, None, None]
        sine = (np.sin(angle[members]) * scale)[:, None, None]
        y = (rows - centre_y[members, None])[:, :, None]
        x = (columns - centre_x[members, None])[:, None, :]
        inside = _INSIDE[name](x * cosine + y * sine, y * cosine - x * sine)
        # Slices are added, because numpy sums slowly over axes of four.
        hits = inside.view(np.uint8)
        hits = sum(hits[:, offset::_SUPERSAMPLING] for offset in range(_SUPERSAMPLING))
        hits = sum(hits[:, :, offset::_SUPERSAMPLING] for offset in range(_SUPERSAMPLING))
        coverage[members] = hits * step**2
    return coverage


def _colours(ground_draws, tint_draws, candidate_draws) -> tuple[np.ndarray, np.ndarray]:
    """Two ends of a gradient for the ground and for the shape: (n, 2, 3) each, within 0 to 1.

    The shape takes the first of the candidates that is lighter than the ground by the contrast,
    or the lightest.
    """
    ground = 0.1 + 0.5 * ground_draws[:, :3]
    candidates = 0.1 + 0.8 * candidate_draws.reshape(-1, _CANDIDATES, 3)
    lighter = (candidates - ground[:, None]) @ _LUMA  # (n, candidates)
    enough = lighter >= _CONTRAST
    chosen = np.where(enough.any(axis=1), enough.argmax(axis=1), lighter.argmax(axis=1))
    shape = candidates[np.arange(len(ground)), chosen]

    def spread(colour: np.ndarray, draws: np.ndarray) -> np.ndarray:
        delta = 0.3 * (draws - 0.5)
        return np.stack([colour - delta, colour + delta], axis=1)

    return spread(ground, ground_draws[:, 3:]), spread(shape, tint_draws)


def _gradient(ends: np.ndarray, draws: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A linear gradient across the image: ends (n, 2, 3), draws (n,) -> (n, H, W, 3)."""
    angle = 2 * math.pi * draws[:, None, None]
    rows = np.linspace(-1, 1, size[0], dtype=np.float32)[:, None]
    columns = np.linspace(-1, 1, size[1], dtype=np.float32)
    ramp = 0.5 + 0.35 * (columns * np.cos(angle) + rows * np.sin(angle))  # (n, H, W)
    first, last = ends[:, 0, None, None], ends[:, 1, None, None]
    return first + ramp[..., None] * (last - first)


def _noise(keys: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(n,) keys -> (n, *shape) float32 of mean 0 and variance 1, close to normal.

    The four 16-bit quarters of one draw are added up: a twentieth of the work of a true normal,
    and exactly the same everywhere.
    """
    bits = random_bits(keys, math.prod(shape), first=1 << 20)
    quarters = bits.view(np.uint16).reshape(len(keys), -1, 4)
    total = quarters.sum(axis=2, dtype=np.uint32).astype(np.float32)
    return ((total - 4 * 32767.5) / (65536 * math.sqrt(4 / 12))).reshape(len(keys), *shape)


def _disc(x, y):
    return x * x + y * y < 1


def _ring(x, y):
    squared = x * x + y * y
    return (squared < 1) & (squared > 0.5**2)


def _square(x, y):
    return np.maximum(np.abs(x), np.abs(y)) < 1


def _frame(x, y):
    distance = np.maximum(np.abs(x), np.abs(y))
    return (distance < 1) & (distance > 0.6)


def _triangle(x, y):
    return np.maximum(-y, np.abs(x) * np.float32(math.sqrt(3) / 2) + y * 0.5) < 0.5


def _star(x, y):
    """Five points: a point is inside if it is inside one fold's edge from tip to notch."""
    fold = 2 * math.pi / 5
    angle = np.arctan2(x, y)
    angle = np.abs(angle - fold * np.rint(angle / fold))  # 0 at a tip, fold / 2 at a notch
    radius = np.sqrt(x * x + y * y)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    notch_along = 0.42 * math.cos(fold / 2)
    notch_across = 0.42 * math.sin(fold / 2)
    return across * (1 - notch_along) + along * notch_across < notch_across


def _cross(x, y):
    x, y = np.abs(x), np.abs(y)
    return (np.maximum(x, y) < 1) & (np.minimum(x, y) < 0.36)


def _moon(x, y):
    return (x * x + y * y < 1) & ((x - 0.55) ** 2 + y * y > 0.8**2)


def _bars(x, y):
    third = np.abs(np.abs(x) - 0.4)
    return (np.maximum(np.abs(x), np.abs(y)) < 1) & (third > 0.2)


def _dots(x, y):
    return (np.abs(x) - 0.56) ** 2 + (np.abs(y) - 0.56) ** 2 < 0.42**2


_INSIDE = {name: globals()[f"_{name}"] for name in NAMES}
# Size of each shape that covers as much as the unit disc: sqrt(pi / its area at size 1).
_AREA_SCALE = {
    "disc": 1.0,
    "ring": 1.1547,
    "square": 0.8862,
    "frame": 1.1074,
    "triangle": 1.5553,
    "star": 1.5954,
    "cross": 1.1533,
    "moon": 1.3973,
    "bars": 1.1441,
    "dots": 1.1905,
}
