"""A file that lists images, with or without labels, as a source."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from ijepa.data.decode import MAX_PIXELS
from ijepa.data.regular_files import MAX_BYTES, read_regular_file
from ijepa.data.sources import FileSource

LIST_SUFFIXES = frozenset((".txt", ".lst", ".csv", ".tsv"))
_HEADERS = frozenset(("path", "file", "filename", "image", "image_path", "file_name"))


def list_source(
    path: Path,
    *,
    channels: int = 3,
    max_pixels: int = MAX_PIXELS,
    cache_bytes: int = 256 << 20,
) -> FileSource:
    """The images that a file names, one a line, in its order.

    Args:
        path: of a .csv file, of PATH or PATH,LABEL, with or without a header; of any other, PATH
            or PATH, a tab and LABEL. Paths are relative to the file's own folder. Empty lines and
            those that begin with # are skipped. A label is a class's name or number.

    Raises:
        ValueError: it cannot be read, names no image, or labels some of them alone; names the line.
    """
    try:
        text = read_regular_file(path, max_bytes=MAX_BYTES).decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    delimiter = "," if path.suffix.lower() == ".csv" else "\t"
    paths: list[str] = []
    names: list[str] = []
    lines: list[int] = []
    reader = csv.reader(
        text.splitlines(),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE,
    )
    try:
        for row in reader:
            if not row or not row[0].strip() or row[0].startswith("#"):
                continue
            if not paths and row[0].strip().lower() in _HEADERS:
                continue
            if len(row) > 2:
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(row)} columns, expected a path and "
                    "perhaps a label"
                )
            if "\0" in row[0]:
                raise ValueError(f"{path}, line {reader.line_num}: a NUL, no text")
            paths.append(row[0].strip())
            names.append(row[1].strip() if len(row) == 2 else "")
            lines.append(reader.line_num)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    if not paths:
        raise ValueError(f"{path} names no image: it must hold a path a line")
    labels, class_names = _labels(path, names, lines)
    return FileSource(
        path.parent,
        paths,
        labels,
        class_names,
        channels=channels,
        max_pixels=max_pixels,
        cache_bytes=cache_bytes,
    )


def _labels(path: Path, names: list[str], lines: list[int]) -> tuple[dict, dict]:
    if not any(names):
        return {}, {}
    for name, line in zip(names, lines, strict=True):
        if not name:
            raise ValueError(f"{path}, line {line}: no label, which others have: label all or none")
    known = sorted(set(names), key=lambda name: (not name.isdecimal(), name.zfill(20), name))
    number = {name: position for position, name in enumerate(known)}
    return {"class": np.array([number[name] for name in names])}, {"class": known}
