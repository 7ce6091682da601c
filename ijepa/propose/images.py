"""What the images of a folder are like, from a sample spread over all of them."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from ijepa.data import ImageError, ImageSource
from ijepa.printable import printable

SAMPLE = 256  # images looked at
SECONDS = 10.0  # after which no further one is, from the 16th on
_FEWEST = 16
_DECODED_SIDE = 128  # larger ones may be reduced while they are decoded: colours do not change


@dataclass(frozen=True)
class ImageFacts:
    """A folder of images.

    Attributes:
        count: images there are.
        looked_at: how many of them were opened and could be read.
        unreadable: how many could not.
        height, width: medians, in pixels.
        mean, std: of each channel, pixels in [0, 1].
        classes: first-level folders that serve as labels; 0 without.
    """

    count: int
    looked_at: int
    unreadable: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: int


def look_at_images(source: ImageSource) -> ImageFacts:
    """Open a sample of the images, the same for the same folder.

    Raises:
        ValueError: none of them can be read; says why the first cannot.
    """
    numbers = np.unique(np.linspace(0, len(source) - 1, num=min(len(source), SAMPLE)).astype(int))
    order = np.random.default_rng(0).permutation(numbers)  # whatever part is seen, is spread
    sizes: list[tuple[int, int]] = []
    means, squares = [], []
    first_error, unreadable = "", 0
    began = time.perf_counter()
    for number in order.tolist():
        if len(sizes) >= _FEWEST and time.perf_counter() - began > SECONDS:
            break
        try:
            image = source.open(number)
            shortest = min(image.height, image.width)
            reduce = next((r for r in (8, 4, 2) if shortest >= r * _DECODED_SIDE), 1)
            pixels = image.decode(reduce)  # (H, W, C) uint8
        except ImageError as error:
            unreadable += 1
            first_error = first_error or f"{printable(source.name(number))}: {error}"
            continue
        sizes.append((image.height, image.width))
        rows = pixels.reshape(-1, pixels.shape[2]).astype(np.float64) / 255
        means.append(rows.mean(axis=0))
        squares.append(np.square(rows).mean(axis=0))
    if not sizes:
        raise ValueError(
            f"none of the {unreadable} images looked at can be read, for instance {first_error}"
        )
    # Every image weighs the same, whatever its size: so does it in training.
    mean = np.mean(means, axis=0)
    std = np.sqrt(np.maximum(np.mean(squares, axis=0) - np.square(mean), 0.0))
    height, width = np.median(np.array(sizes), axis=0)
    return ImageFacts(
        count=len(source),
        looked_at=len(sizes),
        unreadable=unreadable,
        height=int(height),
        width=int(width),
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        classes=len(source.class_names.get("class", ())),
    )
