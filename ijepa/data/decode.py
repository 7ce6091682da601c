"""Bytes of an image file -> uint8 pixels.

JPEG goes through simplejpeg (libjpeg-turbo); everything else, CMYK JPEG and JPEG that libjpeg-turbo
complains about go through Pillow. Whatever the file holds (palette, alpha, 16 bits, CMYK, an EXIF
orientation), it comes out upright with the number of channels asked for.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator

import numpy as np
import simplejpeg
from PIL import Image

MAX_PIXELS = 80_000_000  # just under the size at which Pillow starts to warn of a bomb
_ORIENTATION = 0x0112
_QUARTER_TURNED = (5, 6, 7, 8)


class ImageError(Exception):
    """A file that does not hold a readable image; the message says why."""


class EncodedImage:
    """An image file in memory whose size is known and whose pixels are decoded on request.

    Args:
        data: the whole file.
        channels: 3 for RGB, 1 for luma.
        max_pixels: larger images are refused before any pixel memory is taken.

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
        # Checked before the orientation: for PNG, reading EXIF reads the pixels.
        if height * width > max_pixels:
            raise ImageError(f"{width}x{height} pixels, more than the limit of {max_pixels}")
        if self._pillow is not None:
            with _unheard():
                self._orientation = _pillow_orientation(self._pillow)
            width, height = self._pillow.size
        turned = self._orientation in _QUARTER_TURNED
        self.height, self.width = (width, height) if turned else (height, width)

    def decode(self, reduce: int = 1) -> np.ndarray:
        """The pixels, upright: (H, W, C) uint8, or ceil(H / reduce) by ceil(W / reduce).

        Only JPEG is reduced (1, 2, 4 or 8, while decoding); other formats ignore `reduce`, so
        read the size off the result.

        Raises:
            ImageError: the file is damaged.
        """
        if self._pillow is None:
            pixels = self._decode_jpeg(reduce)
            if pixels is not None:
                return _upright(pixels, self._orientation)
            # libjpeg-turbo's strict mode also refuses what is merely untidy, such as stray bytes
            # between segments. Pillow reads those files and refuses the truncated ones.
            self._pillow = _open_with_pillow(self._data)
        try:
            with _unheard(libtiff=self._pillow.format == "TIFF"):
                pixels = _pillow_pixels(self._pillow, self.channels)
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
        return Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise ImageError(str(error)) from error
    except Exception as error:
        raise ImageError("not an image that Pillow can read" if data else "empty file") from error


def _pillow_orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow turns TIFF upright by itself
        return 1
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # PNG may have to read all its pixels here: decode() will tell what is wrong
        return 1
    return value if value in range(1, 9) else 1


def _pillow_pixels(image: Image.Image, channels: int) -> np.ndarray:
    """(H, W, C) uint8 of any Pillow mode; transparent parts show white."""
    mode = "RGB" if channels == 3 else "L"
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_wide_to_uint8(np.asarray(image)))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        backdrop = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(backdrop, image)
    pixels = np.array(image.convert(mode))
    return pixels if channels == 3 else pixels[:, :, None]


def _wide_to_uint8(values: np.ndarray) -> np.ndarray:
    """Integers are taken to be 16-bit; floats to span 0 to 1, or 0 to 255 if one is above 1."""
    if values.dtype.kind == "f":
        peak = 1.0 if np.nanmax(values) <= 1 else 255.0
        scaled = np.nan_to_num(values) * (255.0 / peak)
    else:
        scaled = values.astype(np.float32) / 257.0
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


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
