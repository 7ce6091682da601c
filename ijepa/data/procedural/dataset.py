"""Procedural data sets, rendered once into a folder of PNG files.

    <cache>/shapes-v1-12000x32x32-seed0/
        images/00000.png ...
        dataset.json        labels and class names; written last: "complete"
        pixels.npy          the same images as one array, because decoding 12,000 PNG files takes
                            seconds at every start; made from them wherever it is missing

Every file is written aside and renamed, so a file that exists is whole. A rendering that was cut
off goes on with the files that are missing; a file damaged later is rendered again.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ijepa.data.cache_folder import default_cache
from ijepa.data.procedural import scene_layout, scenes, shapes
from ijepa.data.sources import ArraySource, FileSource
from ijepa.disk import NotWritten, not_written

_CHUNK = 50  # images rendered by one task
_MEMORY_LIMIT = 1 << 30  # bytes of pixels up to which a data set is held in memory


@dataclass(frozen=True)
class Procedure:
    """How to make a procedural data set; `render` and `labels` take (indices, size, seed)."""

    name: str
    version: int
    num_images: int
    size: tuple[int, int]
    class_names: dict[str, tuple[str, ...]]
    render: Callable[[np.ndarray, tuple[int, int], int], np.ndarray]
    labels: Callable[[np.ndarray, tuple[int, int], int], dict[str, np.ndarray]]


PROCEDURES = {
    "shapes": Procedure(
        name="shapes",
        version=shapes.VERSION,
        num_images=12_000,
        size=(32, 32),
        class_names={"shape": shapes.NAMES},
        render=shapes.render_shapes,
        labels=shapes.shape_labels,
    ),
    "scenes": Procedure(
        name="scenes",
        version=scenes.VERSION,
        num_images=12_000,
        size=(64, 64),
        class_names=scene_layout.CLASS_NAMES,
        render=scenes.render_scenes,
        labels=scene_layout.scene_labels,
    ),
}


def procedural_source(
    name: str,
    *,
    num_images: int | None = None,
    image_size: tuple[int, int] | None = None,
    seed: int = 0,
    cache_dir: str | os.PathLike | None = None,
    num_processes: int | None = None,
    progress: bool = True,
) -> ArraySource | FileSource:
    """The data set `name`, rendered now if it is not in the cache.

    Args:
        name: "shapes" or "scenes".
        num_images, image_size: None for the data set's own.
        num_processes: None for one a core.
        progress: show a bar while rendering.

    Raises:
        ValueError: an unknown name or sizes below 1.
        NotWritten: the cache cannot be written.
    """
    if name not in PROCEDURES:
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(PROCEDURES)}")
    procedure = PROCEDURES[name]
    count = procedure.num_images if num_images is None else num_images
    size = procedure.size if image_size is None else tuple(image_size)
    if count < 1 or len(size) != 2 or min(size) < 1:
        raise ValueError(f"num_images and image_size must be at least 1, got {count} and {size}")
    folder = f"{name}-v{procedure.version}-{count}x{size[0]}x{size[1]}-seed{seed}"
    rendered = _Rendered(procedure, count, size, seed, _root(cache_dir) / folder)
    try:
        rendered.complete(num_processes or _cores(), progress)
        return rendered.source()
    except OSError as error:
        raise NotWritten(
            f"{error}. Rendered images are kept in {rendered.folder.parent}: make room there, or "
            "name another place by the environment variable IJEPA_CACHE"
        ) from error


def _cores() -> int:
    """Cores this process may use, as far as the platform tells."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _root(cache_dir: str | os.PathLike | None) -> Path:
    return default_cache() if cache_dir is None else Path(cache_dir).expanduser()


@dataclass(frozen=True)
class _Rendered:
    """One procedural data set on disk."""

    procedure: Procedure
    count: int
    size: tuple[int, int]
    seed: int
    folder: Path

    def path(self, index: int) -> str:
        return os.path.join("images", f"{index:05d}.png")

    def complete(self, num_processes: int, progress: bool) -> None:
        """Render what is missing; one process at a time, a second one waits for it."""
        if (self.folder / "dataset.json").exists():
            return
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / "lock"):
            if (self.folder / "dataset.json").exists():
                return
            present = set(os.listdir(self.folder / "images"))
            names = (os.path.basename(self.path(index)) for index in range(self.count))
            missing = [index for index, name in enumerate(names) if name not in present]
            self._render_missing(missing, num_processes, progress)
            labels = self.procedure.labels(np.arange(self.count), self.size, self.seed)
            description = {
                "labels": {task: values.tolist() for task, values in labels.items()},
                "class_names": self.procedure.class_names,
            }
            _write(self.folder / "dataset.json", json.dumps(description).encode())

    def source(self) -> ArraySource | FileSource:
        """In memory where it fits, else read image by image."""
        try:
            description = json.loads((self.folder / "dataset.json").read_text())
        except ValueError:
            raise ValueError(
                f"{self.folder / 'dataset.json'} is damaged: delete it, and it is made again"
            ) from None
        labels, names = description["labels"], description["class_names"]
        if self.count * self.size[0] * self.size[1] * 3 > _MEMORY_LIMIT:
            paths = [self.path(index) for index in range(self.count)]
            return FileSource(self.folder, paths, labels, names)
        return ArraySource(self._pixels(), labels, names)

    def render(self, indices: np.ndarray) -> int:
        """Render images into their files; returns how many."""
        images = self.procedure.render(indices, self.size, self.seed)
        for index, pixels in zip(indices, images, strict=True):
            path = self.folder / self.path(index)
            aside = path.with_suffix(f".{os.getpid()}.tmp")
            Image.fromarray(pixels).save(aside, format="PNG", compress_level=3)
            aside.replace(path)
        return len(indices)

    def _render_missing(self, missing: list[int], num_processes: int, progress: bool) -> None:
        chunks = [
            np.array(missing[start : start + _CHUNK]) for start in range(0, len(missing), _CHUNK)
        ]
        title = f"rendering {self.procedure.name}"
        with contextlib.ExitStack() as stack:
            done: Iterable[int] = map(self.render, chunks)
            if num_processes > 1 and len(chunks) > 2:
                # Forked: a spawned process would run the caller's script again.
                context = multiprocessing.get_context("fork")
                pool = stack.enter_context(
                    ProcessPoolExecutor(num_processes, context, _leave_signals)
                )
                # Without this, Ctrl-C would wait until every chunk is rendered.
                stack.callback(pool.shutdown, wait=False, cancel_futures=True)
                done = pool.map(self.render, chunks)
            _track(done, len(missing), title, progress)

    def _pixels(self) -> np.ndarray:
        """(count, H, W, 3) uint8."""
        path = self.folder / "pixels.npy"
        shape = (self.count, *self.size, 3)
        try:
            images = np.load(path)
            if images.shape == shape and images.dtype == np.uint8:
                return images
        except (OSError, ValueError, EOFError):  # missing or damaged
            pass
        images = np.empty(shape, dtype=np.uint8)
        for index in range(self.count):
            images[index] = self._read(index)
        buffer = io.BytesIO()
        np.save(buffer, images)
        _write(path, buffer.getbuffer())
        return images

    def _read(self, index: int) -> np.ndarray:
        path = self.folder / self.path(index)
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image)
            if pixels.shape == (*self.size, 3):
                return pixels
        except (OSError, SyntaxError):  # missing or damaged
            pass
        self.render(np.array([index]))
        with Image.open(path) as image:
            return np.asarray(image)


def _leave_signals() -> None:
    """Ctrl-C goes to the whole group; the process that waits for the pool deals with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _track(finished: Iterable[int], total: int, title: str, progress: bool) -> None:
    """Wait for the numbers of images in `finished` under a bar of `total` images."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    # Short jobs go without: a bar that flashes by only distracts.
    with Progress(*columns, disable=not progress or total < 500) as bar:
        task = bar.add_task(title, total=total)
        for count in finished:
            bar.advance(task, count)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(path: Path, data: bytes | memoryview) -> None:
    """Write aside, flush to disk, rename; NotWritten where that fails, and nothing is left."""
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise not_written(path.name, path.parent, error) from None
