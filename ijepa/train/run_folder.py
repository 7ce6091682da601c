"""The folder of a run: made once, taken away where nothing came of it, and put back where somebody
deleted it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ijepa.config import Recipe
from ijepa.disk import write_whole
from ijepa.report.metrics import FILE_NAME as METRICS
from ijepa.report.metrics import MetricsWriter
from ijepa.train.checkpoint import holds_checkpoint
from ijepa.train.resume import resume_command
from ijepa.train.run_lock import FILE_NAME as LOCK
from ijepa.train.run_lock import RunLock

RECIPE = "recipe.json"


def new_run_folder(recipe: Recipe) -> Path:
    """Make train.output, or the first free runs/<name>-<number>.

    A train.output whose run ended before its first checkpoint is taken again.

    Raises:
        ValueError: train.output holds a run already, is the folder of the images, or cannot be
            made.
    """
    if recipe.train.output is not None:
        folder = Path(recipe.train.output)
        check_unused(folder)
        images = recipe.data.path
        if images is not None and folder.resolve() == Path(images).expanduser().resolve():
            raise ValueError(
                f"train.output {folder} is the folder of the images, and the run's pictures would "
                "be counted among them: choose another, or leave it out"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"train.output {folder} cannot be made: {error.strerror}") from None
        return folder
    number = 1
    while True:
        folder = Path("runs") / f"{recipe.name}-{number:03d}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder


def check_unused(folder: Path) -> None:
    """Raise ValueError where a run could go on from the folder."""
    if holds_checkpoint(folder):
        raise ValueError(
            f"{folder} holds a run already: continue it with `{resume_command(folder)}`"
            " or choose another train.output"
        )


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
