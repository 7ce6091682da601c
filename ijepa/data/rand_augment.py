"""RandAugment (Cubuk et al., 2020) in timm's form `rand-m9-mstd0.5-inc1`.

Two operations of fifteen are drawn for an image, each is applied by a chance of one half, with a
strength drawn around 9 of 10 with a deviation of .5; "inc1": all of them are stronger for a higher
strength. Pillow alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

NAME = "rand-m9-mstd0.5-inc1"
_OPERATIONS, _CHANCE = 2, 0.5
_STRENGTH, _DEVIATION, _STRONGEST = 9.0, 0.5, 10.0

# An operation: (image, strength in [0, 1], sign, colour of what comes in from outside).
Operation = Callable[[Image.Image, float, int, tuple[int, ...]], Image.Image]


def rand_augment(image: Tensor, key: int) -> None:
    """Change a (C, H, W) uint8 image of one or three channels in place, by the draws of a key."""
    rng = np.random.default_rng(key)
    pixels = image.permute(1, 2, 0).numpy()
    grey = pixels.shape[2] == 1
    picture = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if grey else pixels))
    outside = tuple(round(float(value)) for value in pixels.mean(axis=(0, 1)))
    for _ in range(_OPERATIONS):
        operation = OPERATIONS[rng.integers(len(OPERATIONS))]
        strength = min(max(rng.normal(_STRENGTH, _DEVIATION), 0.0), _STRONGEST) / _STRONGEST
        sign = 1 if rng.random() < 0.5 else -1
        if rng.random() < _CHANCE:
            picture = operation(picture, strength, sign, outside)
    changed = np.asarray(picture).reshape(pixels.shape)
    image.copy_(torch.from_numpy(changed.copy()).permute(2, 0, 1))


def _affine(picture: Image.Image, matrix: tuple[float, ...], outside: tuple[int, ...]):
    fill = outside if len(outside) > 1 else outside[0]
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix,
                             Image.Resampling.BICUBIC, fillcolor=fill)  # fmt: skip


def _enhanced(kind: type) -> Operation:
    """1 is the picture itself; at full strength .1 or 1.9."""

    def operation(picture, strength, sign, outside):
        return kind(picture).enhance(max(1 + sign * 0.9 * strength, 0.1))

    return operation


def _rotated(picture, strength, sign, outside):
    fill = outside if len(outside) > 1 else outside[0]
    return picture.rotate(sign * 30 * strength, Image.Resampling.BICUBIC, fillcolor=fill)


def _posterized(picture, strength, sign, outside):
    return ImageOps.posterize(picture, max(4 - int(4 * strength), 1))  # Pillow refuses no bits


def _solarized(picture, strength, sign, outside):
    return ImageOps.solarize(picture, 256 - min(256, int(256 * strength)))


def _solar_added(picture, strength, sign, outside):
    added = min(128, int(110 * strength))
    return picture.point([min(v + added, 255) if v < 128 else v for v in range(256)]
                         * len(picture.getbands()))  # fmt: skip


def _sheared_x(picture, strength, sign, outside):
    return _affine(picture, (1, sign * 0.3 * strength, 0, 0, 1, 0), outside)


def _sheared_y(picture, strength, sign, outside):
    return _affine(picture, (1, 0, 0, sign * 0.3 * strength, 1, 0), outside)


def _moved_x(picture, strength, sign, outside):
    return _affine(picture, (1, 0, sign * 0.45 * strength * picture.size[0], 0, 1, 0), outside)


def _moved_y(picture, strength, sign, outside):
    return _affine(picture, (1, 0, 0, 0, 1, sign * 0.45 * strength * picture.size[1]), outside)


OPERATIONS: tuple[Operation, ...] = (
    lambda picture, strength, sign, outside: ImageOps.autocontrast(picture),
    lambda picture, strength, sign, outside: ImageOps.equalize(picture),
    lambda picture, strength, sign, outside: ImageOps.invert(picture),
    _rotated,
    _posterized,
    _solarized,
    _solar_added,
    _enhanced(ImageEnhance.Color),
    _enhanced(ImageEnhance.Contrast),
    _enhanced(ImageEnhance.Brightness),
    _enhanced(ImageEnhance.Sharpness),
    _sheared_x,
    _sheared_y,
    _moved_x,
    _moved_y,
)
