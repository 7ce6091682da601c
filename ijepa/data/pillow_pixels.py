"""Pixels and orientation of what Pillow has opened, at a bounded cost in memory.

Beside Pillow's own pixels (4 bytes each in colour) only one band of a large image is held while it
is converted, and the result may be reduced on the way.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

LARGE = 4_000_000  # pixels from which an image is reduced where that is asked for
_BAND = 1 << 20  # pixels converted at once
_ORIENTATION = 0x0112


def pillow_pixels(image: Image.Image, channels: int, reduce: int = 1) -> np.ndarray:
    """(H, W, C) uint8 of any Pillow mode; transparent parts show white.

    Args:
        channels: 3 (RGB) or 1 (luma).
        reduce: 1, 2, 4 or 8. An image of more than 4 million pixels is made so much smaller in
            each direction, rounded up, by averaging.
    """
    mode = "RGB" if channels == 3 else "L"
    image.load()  # may change the size, as of a TIFF that is turned
    width, height = image.size
    if width * height <= LARGE:
        reduce = 1
    peak = max(map(_peak, _bands(image))) if image.mode == "F" else 1.0
    pixels = np.empty((-(-height // reduce), -(-width // reduce), channels), dtype=np.uint8)
    done = 0
    for band in _bands(image):
        shown = _converted(band, mode, peak)
        if reduce > 1:
            shown = shown.reduce(reduce)
        stop = done + shown.height
        pixels[done:stop] = np.asarray(shown).reshape(shown.height, shown.width, channels)
        done = stop
    return pixels


def pillow_orientation(image: Image.Image, data: bytes) -> int:
    """EXIF orientation (1 to 8) of an opened image and its file's bytes; 1 where none is told.

    No pixel is decoded: a batch of images is open at once, and their pixels would be too.
    """
    if image.format == "TIFF":  # Pillow turns TIFF upright by itself
        return 1
    try:
        if image.format == "PNG":
            image = Image.open(io.BytesIO(_without_pixels(data)), formats=("PNG",))
        # Not PNG's own method, which reads the pixels to get at what comes after them.
        value = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except Exception:  # damaged metadata does not make the picture unreadable
        return 1
    return value if value in range(1, 9) else 1


def _without_pixels(data: bytes) -> bytes:
    """A PNG file without its IDAT chunks, so that one look at it finds all that is around them."""
    parts, kept_from, position = [], 0, 8
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        end = position + 12 + length
        if data[position + 4 : position + 8] == b"IDAT":
            parts.append(data[kept_from:position])
            kept_from = end
        position = end
    return b"".join([*parts, data[kept_from:]])


def _bands(image: Image.Image) -> Iterator[Image.Image]:
    """The image in bands of whole rows, a multiple of 8 of them; small images as they are."""
    width, height = image.size
    rows = max(_BAND // width // 8 * 8, 8)
    if rows >= height:
        yield image
        return
    for top in range(0, height, rows):
        yield image.crop((0, top, width, min(top + rows, height)))


def _converted(image: Image.Image, mode: str, peak: float) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_wide_to_uint8(np.asarray(image), peak))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        backdrop = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(backdrop, image)
    return image.convert(mode)


def _peak(image: Image.Image) -> float:
    """What white is in a band of floats: 1, or 255 if one is above 1."""
    return 1.0 if np.nanmax(np.asarray(image)) <= 1 else 255.0


def _wide_to_uint8(values: np.ndarray, peak: float) -> np.ndarray:
    """Integers are taken to be 16-bit, floats to span 0 to `peak`."""
    if values.dtype.kind == "f":
        scaled = np.nan_to_num(values) * (255.0 / peak)
    else:
        scaled = values.astype(np.float32) / 257.0
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
