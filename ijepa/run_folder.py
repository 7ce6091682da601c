"""The folder of a run: made once, taken away where nothing came of it, and put back where somebody
deleted it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ijepa.disk import write_whole
from ijepa.metrics import FILE_NAME as METRICS
from ijepa.metrics import MetricsWriter
from ijepa.run_lock import FILE_NAME as LOCK
from ijepa.run_lock import RunLock

RECIPE = "recipe.json"


def take_away(folder: Path, keep_itself: bool) -> None:
    """Remove what a run that took no step has written; anything else stays, and so does its folder.

    Args:
        keep_itself: the folder was there before the run.
    """
    for name in (RECIPE, METRICS, LOCK):
        with contextlib.suppress(FileNotFoundError):
            (folder / name).unlink()
    if not keep_itself:
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()


def put_back(folder: Path, settings: str, metrics: MetricsWriter, lock: RunLock) -> RunLock | None:
    """Where the folder was deleted while the run went on: make it again, with recipe and metrics.

    Returns:
        The lock in the new folder, None where nothing was missing.

    Raises:
        NotWritten: there is no room.
    """
    if (folder / RECIPE).exists():
        return None
    folder.mkdir(parents=True, exist_ok=True)
    lock.release()
    lock = RunLock(folder)
    write_whole(folder / RECIPE, settings)
    metrics.put_back()
    return lock
