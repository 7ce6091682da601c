"""A query image and its neighbours in a row of tiles; Pillow alone."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageOps

_TILE, _GAP, _TEXT = 160, 8, 16
_COLUMNS = 6
_INK, _QUERY = (34, 49, 63), (226, 88, 34)


def draw_neighbours(
    query: Image.Image, neighbours: Sequence[tuple[Image.Image | None, str]]
) -> Image.Image:
    """The query, framed, and then each neighbour with a line of text below it, row by row.

    Args:
        neighbours: picture (None where its file is gone) and text.
    """
    tiles = [(query, "query"), *neighbours]
    columns = min(_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    step = _TILE + _GAP
    size = (columns * step + _GAP, rows * (step + _TEXT) + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, text) in enumerate(tiles):
        left = _GAP + number % columns * step
        top = _GAP + number // columns * (step + _TEXT)
        if picture is None:
            draw.rectangle((left, top, left + _TILE - 1, top + _TILE - 1), outline=_INK)
        else:
            sheet.paste(_tile(picture), (left, top))
        if number == 0:
            draw.rectangle((left - 3, top - 3, left + _TILE + 2, top + _TILE + 2),
                           outline=_QUERY, width=3)  # fmt: skip
        draw.text((left, top + _TILE + 2), _shortened(text), fill=_INK)
    return sheet


def _tile(picture: Image.Image) -> Image.Image:
    """The whole picture on a square; small ones enlarged in whole pixels' colours."""
    upright = ImageOps.exif_transpose(picture).convert("RGB")
    small = max(upright.size) <= _TILE // 2
    method = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return ImageOps.pad(upright, (_TILE, _TILE), method=method, color="#eef1f4")


def _shortened(text: str) -> str:
    """What fits below a tile: the end of a long name says more than its beginning."""
    room = _TILE // 6
    return text if len(text) <= room else "..." + text[3 - room :]
