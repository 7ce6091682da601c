"""Metrics of a run: one JSON object a line, and TensorBoard events on request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends to `folder`/metrics.jsonl, each line with its step; flushed line by line.

    Args:
        folder: of the run.
        first_step: where the run goes on; lines of later steps, left by a run that died after its
            last checkpoint, are dropped, so that every step appears once.
        tensorboard: also write event files below `folder`/tensorboard.

    Raises:
        ModuleNotFoundError: tensorboard asked for, but not installed; says how to get it.
    """

    def __init__(self, folder: Path, first_step: int = 0, tensorboard: bool = False):
        path = folder / FILE_NAME
        kept = [line for line in read_metrics(folder) if line["step"] <= first_step]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._events = _open_tensorboard(folder, first_step) if tensorboard else None

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line; None values are left out of it."""
        values = {name: value for name, value in values.items() if value is not None}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of `folder`/metrics.jsonl; empty without such a file."""
    path = folder / FILE_NAME
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue  # a line cut short by a crash
    return lines


def _open_tensorboard(folder: Path, first_step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ModuleNotFoundError(
            "train.tensorboard needs the tensorboard package: pip install 'ijepa[tensorboard]'"
        ) from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
