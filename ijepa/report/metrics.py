"""Metrics of a run: one JSON object a line, and TensorBoard events on request."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ijepa.disk import not_written, write_whole

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends to `folder`/metrics.jsonl, each line with its step, written line by line.

    Lines that find no room on the disk wait in memory and are written with a later one.

    Args:
        folder: of the run.
        first_step: where the run goes on; lines of later steps, left by a run that died after its
            last checkpoint, are dropped, so that every step appears once. At 0 all are.
        tensorboard: also write event files below `folder`/tensorboard.

    Attributes:
        failure: why lines wait, None where none do.
        events_failure: why TensorBoard's files ended before the run.

    Raises:
        ModuleNotFoundError: tensorboard asked for, but not installed; says how to get it.
        NotWritten: the file cannot be replaced.
    """

    def __init__(self, folder: Path, first_step: int = 0, tensorboard: bool = False):
        path = folder / FILE_NAME
        kept = [line for line in read_metrics(folder) if line["step"] <= first_step > 0]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._folder = folder
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        self._waiting = b""
        self.failure: OSError | None = None
        self.events_failure: OSError | None = None
        self._events = _open_tensorboard(folder, first_step) if tensorboard else None

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line; None values are left out of it."""
        values = {name: value for name, value in values.items() if value is not None}
        self._waiting += json.dumps({"step": step, **values}).encode() + b"\n"
        self._write_waiting()
        if self._events is not None:
            with self._events_may_fail():
                for name, value in values.items():
                    self._events.add_scalar(name, value, step)

    def sync(self) -> None:
        """Flush all lines to the disk.

        Raises:
            NotWritten: lines still wait.
        """
        self._write_waiting()
        if self.failure is not None:
            raise self.failure
        try:
            os.fsync(self._file)
        except OSError as error:
            raise not_written(FILE_NAME, self._folder, error) from None

    def put_back(self) -> None:
        """Write all lines again where the file was deleted; they are still in the open one.

        Raises:
            NotWritten: there is no room.
        """
        path = self._folder / FILE_NAME
        if path.exists():
            return
        lines = os.pread(self._file, os.fstat(self._file).st_size, 0)
        write_whole(path, lines.decode())
        os.close(self._file)
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the files, after one more try where lines wait."""
        if self._file < 0:
            return
        self._write_waiting()
        os.close(self._file)
        self._file = -1
        if self._events is not None:
            with self._events_may_fail():
                self._events.close()

    @contextlib.contextmanager
    def _events_may_fail(self) -> Iterator[None]:
        """The thread that writes them ends with the first error: there is no going on with it."""
        try:
            yield
        except OSError as error:
            self.events_failure = not_written("TensorBoard's files", self._folder, error)
            self._events = None

    def _write_waiting(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
        except OSError as error:
            self.failure = not_written(FILE_NAME, self._folder, error)
        else:
            self.failure = None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of `folder`/metrics.jsonl; empty without such a file.

    A line that a crash cut short or a disk damaged is left out, and so is what no run has written.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return []
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in map(_parsed, texts) if line is not None]


def _parsed(text: str) -> dict[str, Any] | None:
    """A line's figures, or None where it is none."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(line, dict) and type(line.get("step")) is int
    numbers = whole and all(isinstance(value, int | float) for value in line.values())
    return line if numbers else None


def _open_tensorboard(folder: Path, first_step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ModuleNotFoundError(
            "train.tensorboard needs the tensorboard package: pip install 'ijepa[tensorboard]'"
        ) from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
