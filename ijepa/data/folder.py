"""Any folder of images as a source: flat or nested, labelled or not."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import numpy as np

from ijepa.data.decode import MAX_PIXELS
from ijepa.data.extensions import EXTENSIONS
from ijepa.data.kept_scan import KEPT_FROM, keep_scan, load_scan
from ijepa.data.regular_files import kind_of_file
from ijepa.data.sources import FileSource
from ijepa.printable import printable

_RUN_FILES = {"recipe.json", "metrics.jsonl"}


def folder_source(
    path: str | os.PathLike,
    *,
    channels: int = 3,
    max_pixels: int = MAX_PIXELS,
    cache_bytes: int = 256 << 20,
) -> FileSource:
    """Every image below `path`, sorted by relative path.

    If all images lie in two or more folders below `path`, each first-level folder is a class of
    the task "class". Otherwise there are no labels. Hidden files and folders are skipped, links
    are followed. Folders of runs are left out: their curves are no training images. FIFOs, sockets
    and devices are never opened, whatever they are called; `left_out` of the source names them,
    and folders that may not be read.

    Raises:
        ValueError: no such folder, or no image in it; the message says what to try.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ValueError(_not_a_folder(root))
    kept = load_scan(root)
    if kept is not None:
        paths, left_out = kept
        others: Counter = Counter()
    else:
        began = time.time()
        folders: list[str] = []
        paths, others, left_out = _scan(root, folders)
        if len(paths) >= KEPT_FROM:
            keep_scan(root, paths, left_out, folders, began)
    if not paths:
        if left_out and not others.keys() - {"unreadable folder"}:
            raise ValueError(f"no images in {root}, and not all of it can be read: {left_out[0]}")
        raise ValueError(_no_images(root, others))
    labels, class_names = _labels_from_folders(paths)
    return FileSource(
        root,
        paths,
        labels,
        class_names,
        channels=channels,
        max_pixels=max_pixels,
        cache_bytes=cache_bytes,
        left_out=left_out,
    )


def _scan(root: Path, looked_into: list[str]) -> tuple[list[str], Counter, list[str]]:
    """Sorted relative paths of the images, how many other files had which extension, and
    "path: what it is" of everything named like an image that is no file, and of folders that
    cannot be looked into. `looked_into` receives all folders."""
    paths: list[str] = []
    others: Counter = Counter()
    left_out: list[str] = []
    visited: set[str] = set()  # real paths: a link to a parent folder must not loop

    def cannot_look_into(error: OSError) -> None:
        others["unreadable folder"] += 1
        left_out.append(f"{printable(str(error.filename))}: {error.strerror}")

    for folder, folders, files in os.walk(root, followlinks=True, onerror=cannot_look_into):
        looked_into.append(folder)
        real = os.path.realpath(folder)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        if folder != str(root) and set(files) >= _RUN_FILES:
            folders.clear()
            continue
        # In order, so that of two links to one folder it is always the same that counts.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        prefix = os.path.relpath(folder, root)
        special = _special_files(folder)
        for name in files:
            if name.startswith("."):
                continue
            extension = os.path.splitext(name)[1].lower()
            if name in special:
                others[special[name]] += 1
                if extension in EXTENSIONS:
                    path = printable(os.path.join(folder, name))
                    left_out.append(f"{path}: {special[name]}")
            elif extension in EXTENSIONS:
                paths.append(name if prefix == "." else os.path.join(prefix, name))
            else:
                others[extension or "no extension"] += 1
    paths.sort()
    return paths, others, sorted(left_out)


def _special_files(folder: str) -> dict[str, str]:
    """Name to kind of what in a folder is neither a file nor a folder.

    Most file systems tell the kind with the name: no file is looked at for it.
    """
    with os.scandir(folder) as entries:
        odd = [entry for entry in entries if _is_odd(entry)]
    kinds = ((entry.name, kind_of_file(entry.path)) for entry in odd)
    return {name: kind for name, kind in kinds if kind is not None}


def _is_odd(entry: os.DirEntry) -> bool:
    try:
        return not entry.is_file() and not entry.is_dir()
    except OSError:  # a link to itself: whoever opens it is told
        return False


def _labels_from_folders(paths: list[str]) -> tuple[dict, dict]:
    first = [path.split(os.sep, 1)[0] for path in paths]
    names = sorted(set(first))
    if len(names) < 2 or not all(os.sep in path for path in paths):
        return {}, {}
    number = {name: position for position, name in enumerate(names)}
    return {"class": np.array([number[name] for name in first])}, {"class": names}


def _not_a_folder(root: Path) -> str:
    if root.is_file():
        return f"{root} is a file: give the folder that holds the images (unpack an archive first)"
    parent = next((folder for folder in root.absolute().parents if folder.is_dir()), Path("/"))
    return f"no folder {root}: the nearest one that exists is {parent}"


def _no_images(root: Path, others: Counter) -> str:
    known = " ".join(sorted(EXTENSIONS))
    if not others:
        return f"{root} holds no files: check the path, or that the disk is mounted"
    seen = ", ".join(f"{count} {extension}" for extension, count in others.most_common(5))
    return (
        f"no images in {root} or its subfolders, only other files ({seen}): "
        f"unpack archives or convert the images to one of {known}"
    )
