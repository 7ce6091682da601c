"""Where images come from: arrays in memory, or files decoded one at a time.

A source is a numbered set of images with, perhaps, labels. `labels` maps a task's name to (n,)
int64 class numbers, `class_names` maps the same name to what the numbers mean; both are empty
where nothing is known about the images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch.utils.data

from ijepa.data.decode import MAX_PIXELS, EncodedImage, ImageError
from ijepa.data.regular_files import read_regular_file


class OpenedImage(Protocol):
    """One image whose size is known: (H, W, C) uint8 on `decode`."""

    height: int
    width: int

    def decode(self, reduce: int = 1) -> np.ndarray:
        """(H, W, C) uint8, or an image up to `reduce` times smaller in each direction."""


class ImageSource(Protocol):
    """A numbered set of images; `open` raises ImageError where one cannot be read."""

    @property
    def channels(self) -> int:
        """C of what `open` gives."""

    @property
    def labels(self) -> Mapping[str, np.ndarray]:
        """Task -> (n,) integers."""

    @property
    def class_names(self) -> Mapping[str, tuple[str, ...]]:
        """Task -> the meaning of each number."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call image `index` in a message."""

    def open(self, index: int) -> OpenedImage: ...


class ArraySource:
    """Images of one size held in memory.

    Args:
        images: (n, H, W, C) uint8, any number of channels.
        labels: task -> (n,) integers.
        class_names: task -> the meaning of each number.

    Raises:
        ValueError: an array of another shape or type, or labels of another length.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: Mapping[str, np.ndarray] | None = None,
        class_names: Mapping[str, Sequence[str]] | None = None,
    ):
        if images.ndim != 4 or images.dtype != np.uint8:
            raise ValueError(
                f"images must be (n, H, W, C) uint8, got {images.shape} {images.dtype}"
            )
        self.images = images
        self.channels = images.shape[3]
        self.labels, self.class_names = _checked_labels(len(images), labels, class_names)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"image {index}"

    def open(self, index: int) -> OpenedImage:
        return _ArrayImage(self.images[index])


class _ArrayImage:
    def __init__(self, pixels: np.ndarray):
        self.height, self.width = pixels.shape[:2]
        self._pixels = pixels

    def decode(self, reduce: int = 1) -> np.ndarray:
        return self._pixels


class FileSource:
    """Image files, read and decoded on request; small sets stay decoded in memory.

    Args:
        root: folder the paths are relative to.
        paths: (n,) relative paths.
        channels: 3 (RGB) or 1 (luma).
        max_pixels: larger images count as unreadable.
        cache_bytes: decoded pixels kept in memory over all the data workers of one loader. Nothing
            is evicted: under random access over a set that does not fit, keeping the first
            images is as good as any policy.
        left_out: "path: what it is" of what was found beside the images and is no file.
    """

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        labels: Mapping[str, np.ndarray] | None = None,
        class_names: Mapping[str, Sequence[str]] | None = None,
        *,
        channels: int = 3,
        max_pixels: int = MAX_PIXELS,
        cache_bytes: int = 256 << 20,
        left_out: Sequence[str] = (),
    ):
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3 for image files, got {channels}")
        self.root = root
        self.channels = channels
        self.max_pixels = max_pixels
        self.left_out = tuple(left_out)
        self._paths = _PackedStrings(paths)
        self._cache = _PixelCache(cache_bytes)
        self.labels, self.class_names = _checked_labels(len(paths), labels, class_names)

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return str(self.root / self._paths[index])

    def open(self, index: int) -> OpenedImage:
        size = self._cache.sizes.get(index)
        if size is not None:
            return _FileImage(self, index, size)
        encoded = self._read(index)
        return _FileImage(self, index, (encoded.height, encoded.width), encoded)

    def _read(self, index: int) -> EncodedImage:
        try:
            data = read_regular_file(self.root / self._paths[index])
        except OSError as error:
            raise ImageError(error.strerror or str(error)) from error
        return EncodedImage(data, self.channels, self.max_pixels)


class _FileImage:
    """An opened file, or the promise to read it if the cache lacks the size asked for."""

    def __init__(
        self,
        source: FileSource,
        index: int,
        size: tuple[int, int],
        encoded: EncodedImage | None = None,
    ):
        self._source, self._index, self._encoded = source, index, encoded
        self.height, self.width = size

    def decode(self, reduce: int = 1) -> np.ndarray:
        # Keyed by `reduce`: what is in the cache must never change the pixels that come out.
        cache = self._source._cache
        pixels = cache.get((self._index, reduce))
        if pixels is None:
            encoded = self._encoded or self._source._read(self._index)
            pixels = encoded.decode(reduce)
            cache.put((self._index, reduce), pixels, (self.height, self.width))
        return pixels


class _PixelCache:
    def __init__(self, limit_bytes: int):
        self.limit_bytes = limit_bytes
        self.sizes: dict[int, tuple[int, int]] = {}  # index -> (height, width) before reduction
        self._pixels: dict[tuple[int, int], np.ndarray] = {}
        self._bytes = 0

    def get(self, key: tuple[int, int]) -> np.ndarray | None:
        return self._pixels.get(key)

    def put(self, key: tuple[int, int], pixels: np.ndarray, size: tuple[int, int]) -> None:
        worker = torch.utils.data.get_worker_info()
        limit = self.limit_bytes // (worker.num_workers if worker else 1)
        if self._bytes + pixels.nbytes <= limit:
            self._pixels[key] = pixels
            self.sizes[key[0]] = size
            self._bytes += pixels.nbytes


class _PackedStrings:
    """Many strings in two arrays.

    A list of a million `str` is copied page by page into every forked worker, because reading an
    object writes its reference count; arrays are shared.
    """

    def __init__(self, strings: Sequence[str]):
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        self._ends = np.cumsum([len(item) for item in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index > 0 else 0
        data = self._bytes[start : self._ends[index]].tobytes()
        return data.decode("utf-8", "surrogateescape")


def _checked_labels(count, labels, class_names):
    arrays = {task: np.asarray(values, dtype=np.int64) for task, values in (labels or {}).items()}
    for task, values in arrays.items():
        if values.shape != (count,):
            raise ValueError(f"labels[{task!r}] must have shape ({count},), got {values.shape}")
    return arrays, {task: tuple(names) for task, names in (class_names or {}).items()}
