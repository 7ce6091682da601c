"""By what a set of images is known: a hash that changes where an image does."""

from __future__ import annotations

import hashlib
import os

from ijepa.data.sources import ArraySource, ImageSource
from ijepa.data.subset import SourceSubset


def source_identity(source: ImageSource) -> str:
    """16 hex digits over the pixels of an array, or over names, sizes and times of files.

    The files' content is not read, and their folder may move.
    """
    if isinstance(source, SourceSubset):
        whole = source_identity(source.source)
        return hashlib.sha256(whole.encode() + source.indices.tobytes()).hexdigest()[:16]
    digest = hashlib.sha256(f"{len(source)} {source.channels}".encode())
    if isinstance(source, ArraySource):
        digest.update(repr(source.images.shape).encode())
        for image in source.images:
            digest.update(image.tobytes())
        return digest.hexdigest()[:16]
    names = [source.name(index) for index in range(len(source))]
    root = os.path.commonpath(names) if len(names) > 1 else os.path.dirname(names[0])
    for name in names:
        try:
            state = os.stat(name)
            known = f"{state.st_size} {state.st_mtime_ns}"
        except OSError:  # unreadable: it will be counted as such
            known = "none"
        relative = os.path.relpath(name, root).encode("utf-8", "surrogateescape")
        digest.update(relative + b"\0" + known.encode())
    return digest.hexdigest()[:16]
