"""Image numbers -> a uint8 batch, with unreadable images replaced and named."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ijepa.counter_rng import derive_keys
from ijepa.data.decode import ImageError
from ijepa.data.sources import ImageSource, OpenedImage
from ijepa.data.views import Transform, render_view
from ijepa.printable import printable

_REPLACEMENT_STREAM = 0x5EB57
_MAX_REPLACEMENTS = 50
_OPEN_AT_ONCE = 256  # encoded images held in memory together


@dataclass
class ImageBatch:
    """B images as they go to the device.

    Attributes:
        images: (B, C, H, W) uint8.
        indices: (B,) int64, the image each row really shows: another one than asked for where
            that could not be read.
        unreadable: image number -> why it could not be read.
    """

    images: Tensor
    indices: np.ndarray
    unreadable: dict[int, str] = field(default_factory=dict)


def load_batch(
    source: ImageSource,
    indices: np.ndarray,
    transform: Transform,
    keys: np.ndarray | None = None,
) -> ImageBatch:
    """Read, decode, crop and resize images `indices` (B,) with one key each (B,) uint64.

    An unreadable image is replaced by one drawn from a generator keyed by its number, the same in
    every worker, rank and run.

    Raises:
        ValueError: 50 replacements of one image were unreadable too.
    """
    indices = np.asarray(indices, dtype=np.int64)
    keys = np.zeros(len(indices), dtype=np.uint64) if keys is None else keys
    batch = ImageBatch(
        torch.empty(len(indices), source.channels, *transform.size, dtype=torch.uint8),
        indices.copy(),
    )
    for start in range(0, len(indices), _OPEN_AT_ONCE):
        _fill(batch, source, transform, keys, range(len(indices))[start : start + _OPEN_AT_ONCE])
    return batch


def batch_labels(source: ImageSource, batch: ImageBatch) -> dict[str, Tensor]:
    """Task -> (B,) int64 labels of the images that the batch really shows."""
    return {task: torch.from_numpy(values[batch.indices]) for task, values in source.labels.items()}


def _fill(
    batch: ImageBatch, source: ImageSource, transform: Transform, keys: np.ndarray, rows: range
) -> None:
    """Fill some rows of a batch whose `indices` say what is asked for."""
    asked = batch.indices[rows.start : rows.stop].tolist()
    keys = keys[rows.start : rows.stop]
    opened = [_open(source, index, batch.unreadable) for index in asked]
    sizes = np.array([(image.height, image.width) if image else (1, 1) for image in opened])
    views = transform.views(sizes, keys)
    for position, row in enumerate(rows):
        image, index, out = opened[position], asked[position], batch.images[row]
        try:
            if image is not None:
                render_view(image, views[position], out, transform.interpolation)
                continue
        except ImageError as error:
            batch.unreadable[index] = str(error)
        key = keys[position : position + 1]
        batch.indices[row] = _render_replacement(
            source, index, transform, key, out, batch.unreadable
        )


def _open(source: ImageSource, index: int, unreadable: dict[int, str]) -> OpenedImage | None:
    try:
        return source.open(index)
    except ImageError as error:
        unreadable[index] = str(error)
        return None


def _render_replacement(
    source: ImageSource,
    index: int,
    transform: Transform,
    key: np.ndarray,
    out: Tensor,
    unreadable: dict[int, str],
) -> int:
    """Fill `out` with another image and return its number."""
    for attempt in range(_MAX_REPLACEMENTS):
        other = int(derive_keys(_REPLACEMENT_STREAM, index, attempt) % np.uint64(len(source)))
        image = None if other in unreadable else _open(source, other, unreadable)
        if image is None:
            continue
        (view,) = transform.views(np.array([(image.height, image.width)]), key)
        try:
            render_view(image, view, out, transform.interpolation)
        except ImageError as error:
            unreadable[other] = str(error)
            continue
        return other
    raise ValueError(
        f"{printable(source.name(index))} cannot be read ({unreadable[index]}), and neither could "
        f"{_MAX_REPLACEMENTS} images drawn in its place: most of this data set is damaged"
    )
