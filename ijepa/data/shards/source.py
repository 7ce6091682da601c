"""Images in tar files as a source: any of them in any order, each read by one `pread`."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ijepa.data.decode import MAX_PIXELS, EncodedImage, ImageError
from ijepa.data.regular_files import open_regular_file, read_regular_file
from ijepa.data.shards.tar_index import tar_index
from ijepa.data.sources import FileSource

CLASSES = "classes.json"
_OPEN_ARCHIVES = 64  # of one process


class ShardSource(FileSource):
    """The images of tar files.

    Args:
        root: folder of the archives.
        archives: their names, in order; images are numbered through them.
        cache: folder of the indexes, see `tar_index`.

    Raises:
        ValueError: an archive cannot be read, or there is no image in any of them.
    """

    def __init__(
        self,
        root: Path,
        archives: Sequence[str],
        *,
        channels: int = 3,
        max_pixels: int = MAX_PIXELS,
        cache_bytes: int = 256 << 20,
        cache: Path | None = None,
    ):
        indexes = []
        for archive in archives:
            try:
                indexes.append(tar_index(root / archive, cache))
            except OSError as error:
                reason = error.strerror or error
                raise ValueError(f"{root / archive} cannot be read: {reason}") from None
        left_out = [line for index in indexes for line in index.left_out]
        names = [
            f"{archive}/{name}"
            for archive, index in zip(archives, indexes, strict=True)
            for name in index.names
        ]
        if not names:
            raise ValueError(
                f"no images in the {len(archives)} tar files of {root}"
                + (f": {left_out[0]}" if left_out else ": only files of other kinds")
            )
        labels = np.concatenate([index.labels for index in indexes])
        labelled = bool((labels >= 0).all())
        super().__init__(
            root,
            names,
            {"class": labels} if labelled else {},
            {"class": _class_names(root, int(labels.max()) + 1)} if labelled else {},
            channels=channels,
            max_pixels=max_pixels,
            cache_bytes=cache_bytes,
            left_out=left_out,
        )
        self._archives = tuple(archives)
        self._identities = [(index.file_size, index.file_time) for index in indexes]
        self._of = np.repeat(np.arange(len(indexes)), [len(index.names) for index in indexes])
        self._offsets = np.concatenate([index.offsets for index in indexes])
        self._sizes = np.concatenate([index.sizes for index in indexes])
        self._open_archives: OrderedDict[int, int] = OrderedDict()
        self._process = os.getpid()

    def _read(self, index: int) -> EncodedImage:
        offset, size = int(self._offsets[index]), int(self._sizes[index])
        try:
            data = os.pread(self._descriptor(int(self._of[index])), size, offset)
        except OSError as error:
            raise ImageError(error.strerror or str(error)) from error
        if len(data) < size:
            raise ImageError(f"the archive ends {size - len(data):,} bytes before it does")
        return EncodedImage(data, self.channels, self.max_pixels)

    def _descriptor(self, number: int) -> int:
        """Of an open archive; the one used longest ago makes room for another."""
        if self._process != os.getpid():  # a worker closes none that its parent reads from
            self._open_archives.clear()
            self._process = os.getpid()
        if number in self._open_archives:
            self._open_archives.move_to_end(number)
            return self._open_archives[number]
        descriptor = open_regular_file(self.root / self._archives[number])
        state = os.fstat(descriptor)
        if (state.st_size, state.st_mtime_ns) != self._identities[number]:
            os.close(descriptor)
            raise ImageError("its archive was changed since its index was made: start again")
        self._open_archives[number] = descriptor
        if len(self._open_archives) > _OPEN_ARCHIVES:
            os.close(self._open_archives.popitem(last=False)[1])
        return descriptor

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open_archives": OrderedDict()}

    def __del__(self) -> None:
        if getattr(self, "_process", None) == os.getpid():
            for descriptor in self._open_archives.values():
                os.close(descriptor)


def _class_names(root: Path, count: int) -> list[str]:
    """What the numbers mean, of `classes.json` beside the archives; else the numbers."""
    try:
        names = json.loads(read_regular_file(root / CLASSES, max_bytes=1 << 26))
    except (OSError, ValueError, RecursionError):
        names = None
    if isinstance(names, list) and len(names) >= count and all(isinstance(n, str) for n in names):
        return names
    return [str(number) for number in range(count)]
