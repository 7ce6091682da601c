"""Bytes of an image file -> uint8 pixels.

JPEG goes through simplejpeg (libjpeg-turbo); everything else, CMYK JPEG and JPEG that libjpeg-turbo
complains about go through Pillow. Whatever the file holds (palette, alpha, 16 bits, CMYK, an EXIF
orientation), it comes out upright with the number of channels asked for.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import warnings
from collections.abc import Iterator

import numpy as np
import simplejpeg
from PIL import Image

from ijepa.data.pillow_pixels import pillow_orientation, pillow_pixels

MAX_PIXELS = 80_000_000  # just under the size at which Pillow starts to warn of a bomb
# Of formats that are decoded whole, whatever is wanted of them. A PNG of 50 million pixels took 2 s
# and 0.3 GB on one core of an AMD EPYC (Zen 5), one of 79 million 3 to 4 s; a JPEG is reduced while
# it is decoded.
MAX_WHOLE_PIXELS = 50_000_000
# Pillow goes by the content, whatever a file is called, and would hand PostScript to Ghostscript.
_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "PPM", "AVIF", "JPEG2000", "TGA"]
_ORIENTATION = 0x0112
_QUARTER_TURNED = (5, 6, 7, 8)


class ImageError(Exception):
    """A file that does not hold a readable image; the message says why."""


class EncodedImage:
    """An image file in memory whose size is known and whose pixels are decoded on request.

    Args:
        data: the whole file.
        channels: 3 for RGB, 1 for luma.
        max_pixels: larger images are refused before any pixel memory is taken, of formats other
            than JPEG already those of more than 50 million pixels.

    Attributes:
        height, width: upright size in pixels, the EXIF orientation taken into account.

    Raises:
        ImageError: the header is unreadable or the image too large.
    """

    def __init__(self, data: bytes, channels: int = 3, max_pixels: int = MAX_PIXELS):
        self.channels = channels
        self._data = data
        self._pillow: Image.Image | None = None
        header = _jpeg_header(data)
        if header is not None:
            height, width = header
            self._orientation = _jpeg_orientation(data)
        else:
            with _unheard():
                self._pillow = _open_with_pillow(data)
            width, height = self._pillow.size
        self._is_jpeg = header is not None
        limit = max_pixels if self._is_jpeg else min(max_pixels, MAX_WHOLE_PIXELS)
        if height * width > limit:
            remedy = "" if self._is_jpeg else ": make it smaller or a JPEG"
            raise ImageError(f"{width}x{height} pixels, more than the limit of {limit}{remedy}")
        if self._pillow is not None:
            with _unheard():
                self._orientation = pillow_orientation(self._pillow, data)
        turned = self._orientation in _QUARTER_TURNED
        self.height, self.width = (width, height) if turned else (height, width)

    def decode(self, reduce: int = 1) -> np.ndarray:
        """The pixels, upright: (H, W, C) uint8, or ceil(H / reduce) by ceil(W / reduce).

        JPEG is reduced (1, 2, 4 or 8) while decoding, other formats afterwards, and only from 4
        million pixels on: read the size off the result.

        Raises:
            ImageError: the file is damaged.
        """
        if self._is_jpeg:
            pixels = self._decode_jpeg(reduce)
            if pixels is not None:
                return _upright(pixels, self._orientation)
            # libjpeg-turbo's strict mode also refuses what is merely untidy, such as stray bytes
            # between segments. Pillow reads those files and refuses the truncated ones.
        # Not kept: a batch of images is open at once, and Pillow holds on to the pixels.
        image, self._pillow = self._pillow or _open_with_pillow(self._data), None
        try:
            with _unheard(libtiff=image.format == "TIFF"):
                pixels = pillow_pixels(image, self.channels, reduce)
        except Exception as error:  # a damaged file can raise almost anything
            raise ImageError(str(error) or type(error).__name__) from error
        return _upright(pixels, self._orientation)

    def _decode_jpeg(self, reduce: int) -> np.ndarray | None:
        turned = self._orientation in _QUARTER_TURNED
        height, width = (self.width, self.height) if turned else (self.height, self.width)
        try:
            return simplejpeg.decode_jpeg(
                self._data,
                colorspace="RGB" if self.channels == 3 else "GRAY",
                min_height=-(-height // reduce) if reduce > 1 else 0,
                min_width=-(-width // reduce) if reduce > 1 else 0,
            )
        except (ValueError, KeyError):  # KeyError: a header cut off too early
            return None


@contextlib.contextmanager
def _unheard(libtiff: bool = False) -> Iterator[None]:
    """Keep what decoders say about odd files off the terminal, where it would cut through the
    progress display; what makes a file unreadable is an exception.

    Args:
        libtiff: it writes from C to the process's stderr, which is then turned away as well.
    """
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        if libtiff:
            stack.callback(os.close, null := os.open(os.devnull, os.O_WRONLY))
            stack.callback(os.close, kept := os.dup(2))
            stack.callback(os.dup2, kept, 2)
            os.dup2(null, 2)
        yield


def _jpeg_header(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that libjpeg-turbo can turn into RGB, else None."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):  # KeyError: a header cut off too early
        return None
    return None if colorspace in ("CMYK", "YCCK") else (height, width)


def _jpeg_orientation(data: bytes) -> int:
    """EXIF orientation (1 to 8) from the segments before the first scan; 1 where none is told."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == 0xDA:  # start of scan
            break
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        segment = data[position + 4 : position + 2 + length]
        if marker == 0xE1 and segment[:6] == b"Exif\0\0":
            return _exif_orientation(segment)
        position += 2 + length
    return 1


def _exif_orientation(segment: bytes) -> int:
    exif = Image.Exif()
    try:
        exif.load(segment)
        value = exif.get(_ORIENTATION, 1)
    except Exception:  # damaged metadata does not make the picture unreadable
        return 1
    return value if value in range(1, 9) else 1


def _open_with_pillow(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=_formats_here())
    except Image.DecompressionBombError as error:
        raise ImageError(str(error)) from error
    except Exception as error:
        raise ImageError("not an image that Pillow can read" if data else "empty file") from error


@functools.cache
def _formats_here() -> tuple[str, ...]:
    """Those that this build of Pillow has."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation on (H, W, C) pixels."""
    if orientation == 1:
        return pixels
    if orientation in (5, 7):
        pixels = pixels.transpose(1, 0, 2)
    turns = {3: 2, 6: 3, 7: 2, 8: 1}.get(orientation, 0)  # quarter turns, anticlockwise
    pixels = np.rot90(pixels, turns)
    if orientation == 2:
        pixels = pixels[:, ::-1]
    elif orientation == 4:
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
