"""What a set of images holds: counts, sizes, what cannot be read, the colours, a picture."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from ijepa.counter_rng import derive_keys, random_bits
from ijepa.data.decode import ImageError
from ijepa.data.sources import FileSource
from ijepa.printable import printable

_ORDER_STREAM = 0xC4EC4
_REDUCE = 8  # colours are measured, and tiles drawn, of images this much smaller at most
_SMALLEST = 128  # pixels of a side that a tile is cut from
_TILE, _TILES = 96, 8  # pixels of a tile, tiles of a row and of a column
_SMALL_SIDE = 32


@dataclass
class Findings:
    """What `check_images` found.

    Attributes:
        images: in the source.
        looked_at: of them.
        unreadable: "path: why".
        extensions: how many had which.
        heights, widths: of those that can be read, pixels.
        mean, std: (C,) of the channels of pixels in [0, 1], every image weighing the same.
        grey: images of three equal channels.
        tiles: up to 64 pictures, (96, 96, C) uint8.
    """

    images: int
    looked_at: int = 0
    unreadable: list[str] = field(default_factory=list)
    extensions: Counter = field(default_factory=Counter)
    heights: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    std: np.ndarray = field(default_factory=lambda: np.zeros(0))
    grey: int = 0
    tiles: list[np.ndarray] = field(default_factory=list)

    @property
    def small(self) -> int:
        """Images with a side of less than 32 pixels."""
        sides = zip(self.heights, self.widths, strict=True)
        return sum(min(height, width) < _SMALL_SIDE for height, width in sides)


@dataclass
class _Seen:
    """One image."""

    height: int
    width: int
    sums: np.ndarray  # (2, C) mean and mean square of the channels
    grey: bool
    tile: np.ndarray


def check_images(
    source: FileSource,
    *,
    limit: int | None = None,
    threads: int | None = None,
    told: Callable[[int], None] = lambda images: None,
) -> Findings:
    """Decode images of a source, in an order drawn once for all.

    Args:
        limit: look at this many; None at all.
        threads: that decode; None: one a processor.
        told: how many have been looked at.
    """
    order = np.argsort(
        random_bits(derive_keys(_ORDER_STREAM).reshape(1), len(source))[0], kind="stable"
    )[:limit]
    found = Findings(len(source))
    total = np.zeros((2, source.channels))
    for number, seen in _looked_at(source, order, threads or os.cpu_count() or 1):
        found.looked_at += 1
        name = source.name(number)
        found.extensions[os.path.splitext(name)[1].lower()] += 1
        if isinstance(seen, _Seen):
            found.heights.append(seen.height)
            found.widths.append(seen.width)
            found.grey += seen.grey
            total += seen.sums
            if len(found.tiles) < _TILES * _TILES:
                found.tiles.append(seen.tile)
        else:
            found.unreadable.append(f"{printable(name)}: {seen}")
        told(found.looked_at)
    if found.heights:
        mean, square = total / len(found.heights)
        found.mean, found.std = mean, np.sqrt(np.maximum(square - mean**2, 0))
    return found


def _looked_at(
    source: FileSource, order: np.ndarray, threads: int
) -> Iterator[tuple[int, _Seen | str]]:
    """(image number, what was seen or why nothing), in order; few images are held at a time."""
    waiting: deque[tuple[int, Future]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for number in order.tolist():
            waiting.append((number, pool.submit(_look, source, number)))
            if len(waiting) > 2 * threads:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()


def _look(source: FileSource, number: int) -> _Seen | str:
    try:
        image = source.open(number)
        reduce = _REDUCE
        while reduce > 1 and min(image.height, image.width) // reduce < _SMALLEST:
            reduce //= 2
        pixels = image.decode(reduce)
    except ImageError as error:
        return str(error)
    scaled = pixels.reshape(-1, pixels.shape[2]).astype(np.float64) / 255
    grey = pixels.shape[2] == 3 and bool((pixels == pixels[..., :1]).all())
    sums = np.stack([scaled.mean(0), (scaled**2).mean(0)])
    return _Seen(image.height, image.width, sums, grey, _tile(pixels))


def _tile(pixels: np.ndarray) -> np.ndarray:
    """The centre of an image, small."""
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    square = pixels[top : top + side, left : left + side]
    picture = Image.fromarray(square if square.shape[2] == 3 else square[..., 0])
    small = np.asarray(picture.convert("RGB").resize((_TILE, _TILE), Image.Resampling.BOX))
    return small


def contact_sheet(tiles: list[np.ndarray]) -> Image.Image:
    """Up to 64 tiles in rows of 8."""
    rows = max(-(-len(tiles) // _TILES), 1)
    sheet = np.full((rows * _TILE, _TILES * _TILE, 3), 255, dtype=np.uint8)
    for place, tile in enumerate(tiles):
        row, column = divmod(place, _TILES)
        sheet[row * _TILE : (row + 1) * _TILE, column * _TILE : (column + 1) * _TILE] = tile
    return Image.fromarray(sheet)
