"""Images from disk or from a procedure, cropped and batched as a pure function of the step."""

from __future__ import annotations

import os

from ijepa.data.batch import ImageBatch, load_batch
from ijepa.data.cache_folder import default_cache
from ijepa.data.decode import ImageError
from ijepa.data.folder import folder_source
from ijepa.data.images_at import images_at
from ijepa.data.loader import Loader, TrainingBatch, build_loader
from ijepa.data.procedural.dataset import PROCEDURES, procedural_source
from ijepa.data.sources import ArraySource, FileSource, ImageSource
from ijepa.data.views import CenterCrop, RandomResizedCrop, Squash, Transform

__all__ = [
    "ArraySource",
    "CenterCrop",
    "FileSource",
    "ImageBatch",
    "ImageError",
    "ImageSource",
    "Loader",
    "RandomResizedCrop",
    "Squash",
    "TrainingBatch",
    "Transform",
    "build_loader",
    "build_source",
    "default_cache",
    "folder_source",
    "images_at",
    "load_batch",
    "procedural_source",
]


def build_source(
    kind: str,
    *,
    path: str | os.PathLike | None = None,
    channels: int = 3,
    num_images: int | None = None,
    image_size: tuple[int, int] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ImageSource:
    """A source by name: "shapes", "scenes", or "folder" with a `path`.

    Args:
        path, channels: see `images_at`.
        num_images, image_size, seed, progress: see `procedural_source`.

    Raises:
        ValueError: an unknown kind, a folder without path, or what the source itself refuses.
    """
    if kind == "folder":
        if path is None:
            raise ValueError("a folder source needs the path of a folder of images")
        return images_at(path, channels=channels)
    if kind not in PROCEDURES:
        raise ValueError(f"unknown data source {kind!r}: choose folder, {', '.join(PROCEDURES)}")
    if channels != 3:
        raise ValueError(f"{kind} has 3 channels, got channels={channels}")
    return procedural_source(
        kind,
        num_images=num_images,
        image_size=image_size,
        seed=seed,
        progress=progress,
    )
