"""Which part of an image is seen, and how large: crops as a pure function of size and key.

A transform turns image sizes and 64-bit keys into `View`s; `render_view` decodes and resamples one
view. Resampling is PyTorch's antialiased uint8 kernel, which agrees with Pillow's to within a
grey level (bicubic: two, where nothing is clipped), so the crops look as in the released code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa.counter_rng import uniform
from ijepa.data.sources import OpenedImage

_ATTEMPTS = 10  # crops drawn before the centre crop is taken, as in torchvision
INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class View:
    """Cut `box` from the image, resize it to `resized`, cut the output at `offset`, maybe flip.

    Attributes:
        box: (top, left, height, width) in pixels of the whole image.
        resized: (height, width) the box is resampled to.
        offset: (top, left) of the output in the resampled box.
        flip: mirror left and right.
    """

    box: tuple[int, int, int, int]
    resized: tuple[int, int]
    offset: tuple[int, int] = (0, 0)
    flip: bool = False


class Transform(Protocol):
    """Image sizes and keys -> views, each a function of its own image's size and key alone."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the output."""

    @property
    def interpolation(self) -> str:
        """One of `INTERPOLATIONS`."""

    def views(self, sizes: np.ndarray, keys: np.ndarray) -> list[View]:
        """(B, 2) heights and widths, (B,) uint64 keys -> B views."""


@dataclass(frozen=True)
class RandomResizedCrop:
    """A crop of random area and aspect ratio, resized to `size`: the training transform.

    Attributes:
        size: (height, width) of the output.
        scale: range of the crop's share of the image's area.
        ratio: range of the crop's width / height, drawn uniformly in the logarithm.
        interpolation: "bilinear" (the released code) or "bicubic".
        flip: mirror half of the crops; off in the released code.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.3, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"
    flip: bool = False

    def __post_init__(self):
        _check(self.size, self.interpolation)
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be a range within (0, 1], got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be an increasing positive range, got {self.ratio}")

    def views(self, sizes: np.ndarray, keys: np.ndarray) -> list[View]:
        boxes, flips = self._draw(np.asarray(sizes, dtype=np.int64), keys)
        return [
            View(tuple(box), self.size, flip=flip)
            for box, flip in zip(boxes.tolist(), flips.tolist(), strict=True)
        ]

    def _draw(self, sizes: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, 2), (B,) -> boxes (B, 4) int64 and flips (B,) bool."""
        draws = uniform(keys, 2 * _ATTEMPTS + 3)
        height, width = sizes[:, :1], sizes[:, 1:]  # (B, 1)
        share = self.scale[0] + draws[:, :_ATTEMPTS] * (self.scale[1] - self.scale[0])
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = np.exp(low + draws[:, _ATTEMPTS : 2 * _ATTEMPTS] * (high - low))
        area = share * (height * width)  # (B, attempts)
        crop_width = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        crop_height = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (crop_width > 0) & (crop_width <= width)
        fits &= (crop_height > 0) & (crop_height <= height)

        rows = np.arange(len(sizes))
        first = fits.argmax(axis=1)
        any_fits = fits[rows, first]
        fallback = _largest_within_ratio(sizes, self.ratio)
        box_height = np.where(any_fits, crop_height[rows, first], fallback[:, 0])
        box_width = np.where(any_fits, crop_width[rows, first], fallback[:, 1])
        room = sizes - np.stack([box_height, box_width], axis=1)  # (B, 2)
        corner = np.floor(draws[:, -3:-1] * (room + 1)).astype(np.int64)
        corner = np.where(any_fits[:, None], corner, room // 2)
        flips = (draws[:, -1] < 0.5) if self.flip else np.zeros(len(sizes), dtype=bool)
        return np.column_stack([corner, box_height, box_width]), flips


@dataclass(frozen=True)
class CenterCrop:
    """Resize so that the output covers `crop_ratio` of the tighter side, then cut the centre.

    224 out of 256 is the usual evaluation crop; 1.0 keeps all of the tighter side.
    """

    size: tuple[int, int]
    crop_ratio: float = 224 / 256
    interpolation: str = "bilinear"

    def __post_init__(self):
        _check(self.size, self.interpolation)
        if not 0 < self.crop_ratio <= 1:
            raise ValueError(f"crop_ratio must be within (0, 1], got {self.crop_ratio}")

    def views(self, sizes: np.ndarray, keys: np.ndarray | None = None) -> list[View]:
        return [self._view(int(height), int(width)) for height, width in sizes]

    def _view(self, height: int, width: int) -> View:
        out_height, out_width = self.size
        zoom = max(out_height / height, out_width / width) / self.crop_ratio
        resized = (max(out_height, round(height * zoom)), max(out_width, round(width * zoom)))
        offset = ((resized[0] - out_height) // 2, (resized[1] - out_width) // 2)
        return View((0, 0, height, width), resized, offset)


@dataclass(frozen=True)
class Squash:
    """The whole image resized to `size`, aspect ratio ignored; the image itself where it fits."""

    size: tuple[int, int]
    interpolation: str = "bilinear"

    def __post_init__(self):
        _check(self.size, self.interpolation)

    def views(self, sizes: np.ndarray, keys: np.ndarray | None = None) -> list[View]:
        return [View((0, 0, int(height), int(width)), self.size) for height, width in sizes]


@dataclass(frozen=True)
class Flipped:
    """Another transform's views, half of them mirrored."""

    of: Transform

    @property
    def size(self) -> tuple[int, int]:
        return self.of.size

    @property
    def interpolation(self) -> str:
        return self.of.interpolation

    def views(self, sizes: np.ndarray, keys: np.ndarray) -> list[View]:
        flips = uniform(keys, 1)[:, 0] < 0.5
        views = self.of.views(sizes, keys)
        return [replace(v, flip=bool(flip)) for v, flip in zip(views, flips, strict=True)]


def render_view(image: OpenedImage, view: View, out: Tensor, interpolation: str) -> None:
    """Decode and resample one view into `out` (C, H, W) uint8.

    Raises:
        ImageError: the file is damaged.
    """
    reduce = reduction(view)
    pixels = image.decode(reduce)  # (H', W', C)
    top, left, height, width = _scaled_box(view.box, image, pixels) if reduce > 1 else view.box
    patch = torch.from_numpy(pixels[top : top + height, left : left + width])
    patch = patch.permute(2, 0, 1)[None]  # (1, C, h, w), channels last in memory
    if (height, width) != view.resized:
        patch = F.interpolate(patch, size=view.resized, mode=interpolation, antialias=True)
    if view.resized != out.shape[1:]:
        top, left = view.offset
        patch = patch[:, :, top : top + out.shape[1], left : left + out.shape[2]]
    out.copy_(patch[0].flip(2) if view.flip else patch[0])


def reduction(view: View) -> int:
    """How far a JPEG may be shrunk while decoding: 1, 2, 4 or 8.

    The box keeps at least twice the resolution of the output, so that the antialiasing filter
    still does the last halving. Crops of two photographs differed by 1.0 to 1.7 grey levels on
    average from those of the full decode.
    """
    zoom = min(view.box[2] / view.resized[0], view.box[3] / view.resized[1])
    if zoom < 4:  # the usual case, without the search
        return 1
    return next(factor for factor in (8, 4, 2) if zoom >= 2 * factor)


def _scaled_box(box, image: OpenedImage, pixels: np.ndarray) -> tuple[int, int, int, int]:
    """The box in the coordinates of the pixels that the decoder returned."""
    factor = round(max(image.height, image.width) / max(pixels.shape[:2]))  # 1 if it cannot reduce
    top, left = round(box[0] / factor), round(box[1] / factor)
    bottom = min(pixels.shape[0], round((box[0] + box[2]) / factor))
    right = min(pixels.shape[1], round((box[1] + box[3]) / factor))
    return top, left, bottom - top, right - left


def _largest_within_ratio(sizes: np.ndarray, ratio: tuple[float, float]) -> np.ndarray:
    """(B, 2) -> the largest (height, width) inside each image whose aspect is within `ratio`."""
    height, width = sizes[:, 0], sizes[:, 1]
    aspect = width / height
    tall = np.minimum(height, np.maximum(1, np.rint(width / ratio[0]))).astype(np.int64)
    wide = np.minimum(width, np.maximum(1, np.rint(height * ratio[1]))).astype(np.int64)
    return np.column_stack(
        [np.where(aspect < ratio[0], tall, height), np.where(aspect > ratio[1], wide, width)]
    )


def _check(size: tuple[int, int], interpolation: str) -> None:
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be (height, width), both at least 1, got {size}")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation must be one of {INTERPOLATIONS}, got {interpolation!r}")
