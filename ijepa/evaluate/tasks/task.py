"""A task: images to fit on, images to test with, and one label each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ijepa.counter_rng import derive_keys, random_bits
from ijepa.data.sources import ArraySource, FileSource, ImageSource
from ijepa.data.subset import SourceSubset

_SPLIT_STREAM = 0x5B117
_NAMED = 5  # classes or files that a message names


class TaskDataError(ValueError):
    """Images or labels of a task are missing or wrong; the message shows what is expected."""


@dataclass(frozen=True)
class Split:
    """Images and labels.

    Attributes:
        source: n images.
        labels: (n,) int64 from 0.
    """

    source: ImageSource
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> Split:
        """At most so many images, the first of a fixed draw; None takes all."""
        if count is None or count >= len(self):
            return self
        return self.subset(drawn(len(self), count))

    def subset(self, indices: np.ndarray) -> Split:
        """The images of these numbers."""
        return Split(SourceSubset(self.source, indices), self.labels[indices])


@dataclass(frozen=True)
class Task:
    """What is evaluated on.

    Attributes:
        name: of the task.
        train, test: images to fit on and to test with.
        class_names: what each label means.

    Raises:
        TaskDataError: labels outside the classes, classes that nothing is fitted on, no test image.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]

    def __post_init__(self):
        for what, split in (("fitted", self.train), ("tested", self.test)):
            labels = split.labels
            if len(labels) == 0:
                raise TaskDataError(f"{self.name}: there are no images to be {what}")
            wrong = np.flatnonzero((labels < 0) | (labels >= self.classes))
            if len(wrong):
                at = int(wrong[0])
                raise TaskDataError(
                    f"{self.name}: {split.source.name(at)} has label {labels[at]}, labels must be "
                    f"0 to {self.classes - 1} ({len(wrong)} are not)"
                )
        counts = np.bincount(self.train.labels, minlength=self.classes)
        missing = [self.class_names[label] for label in np.flatnonzero(counts == 0)]
        if missing:
            raise TaskDataError(
                f"{self.name}: no image to fit on of {some(missing)}, of {self.classes} classes"
            )

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def limited(self, train: int | None, test: int | None) -> Task:
        """At most so many images of each, the first of a fixed draw."""
        parts = [
            split
            if count is None or count >= len(split)
            else split.subset(drawn(len(split), count))
            for split, count in ((self.train, train), (self.test, test))
        ]
        return Task(self.name, parts[0], parts[1], self.class_names)


def drawn(total: int, count: int) -> np.ndarray:
    """(count,) numbers below `total` in ascending order, by a fixed draw."""
    return np.sort(_order(total)[:count])


def split_in_two(both: Split, class_names: Sequence[str], name: str) -> Task:
    """A fifth of each class, at least one image, is held out by a fixed draw, to test with.

    Raises:
        TaskDataError: a class of one image, which cannot be both fitted and tested.
    """
    counts = np.bincount(both.labels, minlength=len(class_names))
    alone = [class_names[label] for label in np.flatnonzero(counts == 1)]
    if alone:
        raise TaskDataError(
            f"{name}: {some(alone)} {'has' if len(alone) == 1 else 'have'} one image alone, and a "
            "fifth of each class is held out to test with: add images, or leave the class out, or "
            "split the images yourself"
        )
    tested = np.zeros(len(both), dtype=bool)
    order = _order(len(both))
    for label in range(len(class_names)):
        of_class = order[both.labels[order] == label]
        tested[of_class[: max(1, len(of_class) // 5)]] = True
    train, test = (both.subset(np.flatnonzero(part)) for part in (~tested, tested))
    return Task(name, train, test, tuple(class_names))


def file_split(
    root: Path, paths: Sequence[str], labels: Sequence[int] | np.ndarray, channels: int
) -> Split:
    """Files below `root`, none of which is opened before it is needed."""
    source = FileSource(root, list(paths), channels=channels, cache_bytes=0)
    return Split(source, np.asarray(labels, dtype=np.int64))


def array_split(images: np.ndarray, labels: np.ndarray) -> Split:
    """Images (n, H, W, C) uint8 in memory."""
    return Split(ArraySource(images), np.asarray(labels, dtype=np.int64))


def read_text(path: Path, layout: str) -> str:
    """A file's text.

    Raises:
        TaskDataError: it is not there, with the layout that is expected.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no text"
        raise TaskDataError(f"{path}: {reason}\n{layout}") from None


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    more = f", ... ({len(names)})" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _order(total: int) -> np.ndarray:
    key = derive_keys(_SPLIT_STREAM, total)
    return random_bits(key.reshape(1), total)[0].argsort(kind="stable")
