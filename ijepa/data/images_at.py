"""Images wherever they are: a folder, tar files, a list, a data set of Hugging Face's."""

from __future__ import annotations

import os
from pathlib import Path

from ijepa.data.cache_folder import index_cache
from ijepa.data.decode import MAX_PIXELS
from ijepa.data.extensions import EXTENSIONS
from ijepa.data.folder import folder_source
from ijepa.data.image_list import LIST_SUFFIXES, list_source
from ijepa.data.shards.source import ShardSource
from ijepa.data.sources import FileSource


def images_at(
    path: str | os.PathLike,
    *,
    channels: int = 3,
    max_pixels: int = MAX_PIXELS,
    cache_bytes: int = 256 << 20,
) -> FileSource:
    """The images that a path stands for.

    Args:
        path: a folder of images (`folder_source`); a tar file, or a folder with tar files and
            neither images nor folders beside them (`ShardSource`); a .txt, .lst, .csv or .tsv file
            that lists images (`list_source`).

    Raises:
        ValueError: nothing there, or no image in it; the message says what to try.
    """
    place = Path(path).expanduser()
    options = {"channels": channels, "max_pixels": max_pixels, "cache_bytes": cache_bytes}
    if place.is_file() and place.suffix.lower() == ".tar":
        return ShardSource(place.parent, [place.name], cache=index_cache(), **options)
    if place.is_file() and place.suffix.lower() in LIST_SUFFIXES:
        return list_source(place, **options)
    archives = _archives(place) if place.is_dir() else []
    if archives:
        return ShardSource(place, archives, cache=index_cache(), **options)
    return folder_source(place, **options)


def _archives(folder: Path) -> list[str]:
    """Sorted names of the tar files of a folder that holds nothing else to take images from."""
    archives: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                extension = os.path.splitext(entry.name)[1].lower()
                if entry.name.startswith("."):
                    continue
                if entry.is_dir() or extension in EXTENSIONS:
                    return []
                if extension == ".tar":
                    archives.append(entry.name)
    except OSError:
        return []  # the folder's own source says what is wrong
    return sorted(archives)
