"""The folder of a run: made once, taken away where nothing came of it, and put back where somebody
deleted it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from ijepa.config import Recipe
from ijepa.disk import write_whole
from ijepa.recipes import recipe_to_dict
from ijepa.report.metrics import FILE_NAME as METRICS
from ijepa.report.metrics import MetricsWriter
from ijepa.train import distributed
from ijepa.train.checkpoint import holds_checkpoint
from ijepa.train.resume import resume_command
from ijepa.train.run_lock import FILE_NAME as LOCK
from ijepa.train.run_lock import RunLock

RECIPE = "recipe.json"


class RunFolder:
    """A folder that this run alone writes into, the same on all ranks.

    Raises:
        RunLocked: another process trains into it; on all ranks.
    """

    def __init__(self, path: Path):
        self.path = path
        self._begun_here = self._was_there = False
        self._lock: RunLock | None = None  # the first rank's
        distributed.on_main(self._take_lock)

    @classmethod
    def begun(cls, recipe: Recipe) -> RunFolder:
        """A new run's, with recipe.json in it; see `new_run_folder`."""
        was_there = recipe.train.output is not None and Path(recipe.train.output).exists()
        folder = cls(Path(distributed.on_main(lambda: str(new_run_folder(recipe)))))
        folder._begun_here, folder._was_there = True, was_there
        try:
            distributed.on_main(lambda: folder._begin(recipe))
        except BaseException:
            folder.close(nothing_done=True)
            raise
        return folder

    def _begin(self, recipe: Recipe) -> None:
        check_unused(self.path)  # again: somebody else's run may have ended since
        write_whole(self.path / RECIPE, _settings(recipe))

    def _take_lock(self) -> None:
        self._lock = RunLock(self.path)

    def put_back(self, recipe: Recipe, metrics: MetricsWriter) -> bool:
        """Where somebody deleted it meanwhile: make it again, with recipe and metrics.

        Returns:
            Whether it was missing.

        Raises:
            NotWritten: there is no room.
        """
        if (self.path / RECIPE).exists():
            return False
        self.path.mkdir(parents=True, exist_ok=True)
        if self._lock is not None:
            self._lock.release()
        self._take_lock()
        write_whole(self.path / RECIPE, _settings(recipe))
        metrics.put_back()
        return True

    def close(self, nothing_done: bool) -> None:
        """Let others train into it.

        Args:
            nothing_done: a run that began here took no step: what it has written goes away.
        """
        removable = nothing_done and self._begun_here and not holds_checkpoint(self.path)
        if distributed.is_main() and removable:
            take_away(self.path, keep_itself=self._was_there)
        if self._lock is not None:
            self._lock.release()


def _settings(recipe: Recipe) -> str:
    """The content of recipe.json."""
    return json.dumps(recipe_to_dict(recipe), indent=1)


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
        _check_nothing_is_overwritten(folder)
        images = recipe.data.path
        if images is not None and folder.resolve() == Path(images).expanduser().resolve():
            raise ValueError(
                f"train.output {folder} is the folder of the images, and the run's pictures would "
                "be counted among them: choose another, or leave it out"
            )
        return made_folder(folder, "train.output")
    return free_folder(recipe.name, "--train.output")


def made_folder(folder: Path, option: str) -> Path:
    """The folder that `option` names, made where it is not there.

    Raises:
        ValueError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option} {folder} cannot be made: {error.strerror}") from None
    return folder


def free_folder(name: str, option: str) -> Path:
    """Make the first free runs/<name>-<number>.

    Args:
        option: by which another folder could be given.

    Raises:
        ValueError: it cannot be made.
    """
    number = 1
    while True:
        folder = Path("runs") / f"{name}-{number:03d}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise ValueError(
                f"{folder} cannot be made in {Path.cwd()}: {error.strerror}; give another folder "
                f"by {option}"
            ) from None
        else:
            return folder


def check_unused(folder: Path) -> None:
    """Raise ValueError where a run could go on from the folder."""
    if holds_checkpoint(folder):
        raise ValueError(
            f"{folder} holds a run already: continue it with `{resume_command(folder)}`"
            " or choose another train.output"
        )


def _check_nothing_is_overwritten(folder: Path) -> None:
    """Raise ValueError where files of a run's names lie in the folder that no run has written: a
    run that began there has left its lock."""
    names = (RECIPE, METRICS, "summary.md", "masks.png", "curves.png", "tensorboard")
    found = [name for name in names if (folder / name).exists()]
    if found and not (folder / LOCK).exists():
        raise ValueError(
            f"train.output {folder} holds {', '.join(found)} from somewhere else, which the run "
            "would write over: choose another folder"
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
