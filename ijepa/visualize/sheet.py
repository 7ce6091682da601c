"""Sheets of pictures with words: rows and columns of tiles, named on top and at the side.

Pillow alone. What is written may come from anybody's file names: it is text in a picture, never
markup.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ijepa.printable import printable

PAPER, INK, MUTED = (255, 255, 255), (34, 49, 63), (123, 138, 151)
_GAP, _LINE = 6, 16
_FONT_SIZE = 12


def draw_sheet(
    rows: Sequence[Sequence[np.ndarray | None]],
    *,
    columns: Sequence[str] = (),
    names: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    tile: int = 128,
) -> Image.Image:
    """Pictures in rows.

    Args:
        rows: (H, W, 3) uint8 each, None leaves its place empty. Pictures are enlarged in whole
            pixels' colours, or reduced, until their longer side is `tile`.
        columns: headings.
        names: at the side, one a row.
        captions: a line below each picture.
        tile: longer side of a picture.

    Raises:
        ValueError: no picture.
    """
    if not rows or not any(picture is not None for row in rows for picture in row):
        raise ValueError("a sheet needs at least one picture")
    font = _font()
    resized = [[None if p is None else _tile(p, tile) for p in row] for row in rows]
    width = max(p.width for row in resized for p in row if p is not None)
    height = max(p.height for row in resized for p in row if p is not None)
    side = max((_width(font, name) for name in names), default=0)
    side = min(side, tile) + (2 * _GAP if side else 0)
    below = _LINE if captions else 0
    across = max(len(row) for row in rows)
    headings = [_wrapped(name, width, font) for name in columns]
    top = max((len(lines) for lines in headings), default=0) * _LINE
    step_x, step_y = width + _GAP, height + below + _GAP
    sheet = Image.new(
        "RGB", (side + across * step_x + _GAP, top + len(rows) * step_y + _GAP), PAPER
    )
    draw = ImageDraw.Draw(sheet)
    for number, lines in enumerate(headings):
        for line, text in enumerate(lines):
            draw.text((side + _GAP + number * step_x, 2 + line * _LINE), text, INK, font)
    for number, row in enumerate(resized):
        y = top + _GAP + number * step_y
        if number < len(names):
            for line, text in enumerate(_wrapped(names[number], tile, font)):
                draw.text((_GAP, y + 2 + line * _LINE), text, INK, font)
        for place, picture in enumerate(row):
            x = side + _GAP + place * step_x
            if picture is not None:
                sheet.paste(picture, (x, y))
            if number < len(captions) and place < len(captions[number]):
                text = shortened(captions[number][place], width, font)
                draw.text((x, y + height + 1), text, MUTED, font)
    return sheet


def shortened(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """What fits into so many pixels: the end of a long name says more than its beginning."""
    text = printable(text)
    if _width(font, text) <= width:
        return text
    while text and _width(font, "..." + text) > width:
        text = text[1:]
    return "..." + text


def as_rgb(image: np.ndarray) -> np.ndarray:
    """(C, H, W) uint8 -> (H, W, 3): the first three channels, or the first as grey."""
    shown = image[:3] if image.shape[0] >= 3 else image[:1].repeat(3, axis=0)
    return np.ascontiguousarray(shown.transpose(1, 2, 0))


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_FONT_SIZE)


def _width(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str) -> int:
    return int(font.getlength(text)) + 1


def _wrapped(text: str, width: int, font) -> list[str]:
    """Lines of at most `width` pixels, broken between words; a long word is shortened."""
    lines: list[str] = []
    for word in printable(text).split():
        if lines and _width(font, f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(shortened(word, width, font))
    return lines


def _tile(pixels: np.ndarray, side: int) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    longest = max(picture.size)
    if longest <= side:
        zoom = side // longest
        size = (picture.width * zoom, picture.height * zoom)
        return picture.resize(size, Image.Resampling.NEAREST)
    size = (max(picture.width * side // longest, 1), max(picture.height * side // longest, 1))
    return picture.resize(size, Image.Resampling.LANCZOS)
