"""Going on with a run: which checkpoint, by which command, and which settings may change."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from ijepa.config import Recipe
from ijepa.recipes import load_recipe, recipe_from_dict, recipe_to_dict
from ijepa.train.checkpoint import (
    Checkpoint,
    CheckpointError,
    checkpoint_folders,
    find_checkpoint,
    load_checkpoint,
    read_metadata,
)

# What may differ when a run is resumed: nothing of it changes the weights that come out, except
# train.steps, which moves the end of the run and leaves the schedules where they were.
RESUMABLE = (
    "data.path",
    "data.workers",
    "train.steps",
    "train.device",
    "train.accumulate",
    "train.parallel",
    "train.checkpoint_every",
    "train.log_every",
    "train.tensorboard",
    "monitor.every",
    "monitor.images",
    "monitor.online_images",
    "monitor.evaluate",
    "monitor.probe_images",
)


def load_to_resume(path: Path) -> Checkpoint:
    """The checkpoint that a run's folder, its checkpoints folder or a checkpoint stands for.

    Raises:
        CheckpointError: nothing there, or something damaged; with the command that goes on from
            the newest intact one beside it, where there is one.
    """
    try:
        return load_checkpoint(path)
    except CheckpointError as error:
        older = next(_intact_beside(path), None)
        if older is None:
            raise
        raise CheckpointError(
            f"{error}. The checkpoint of step {read_metadata(older)['step']} beside it is intact: "
            f"continue from there with\n  {resume_command(older)}"
        ) from None


def _intact_beside(path: Path) -> Iterator[Path]:
    """Whole checkpoints among those that `path` chooses from, the newest first."""
    root = path if path.name == "checkpoints" else path / "checkpoints"
    if not root.is_dir():
        root = path.parent
    for folder in reversed(checkpoint_folders(root)):
        try:
            load_checkpoint(folder)
        except CheckpointError:
            continue
        yield folder


def run_folder_of(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint's folder lies in.

    Raises:
        CheckpointError: it lies somewhere else, where a resumed run must not write.
    """
    if checkpoint.parent.name != "checkpoints":
        checkpoint = checkpoint.resolve()
    if checkpoint.parent.name != "checkpoints":
        raise CheckpointError(
            f"{checkpoint} does not lie in a run's folder, into which a resumed run could write: "
            "move it to RUN/checkpoints/ and give RUN"
        )
    return checkpoint.parent.parent


def saved_recipe(checkpoint: Checkpoint, name: str | None) -> Recipe:
    """The recipe that a checkpoint was written under.

    Args:
        name: of the recipe that the user believes it to be; None where none was given.

    Raises:
        ValueError: it holds no settings, or is of another recipe.
    """
    try:
        saved = recipe_from_dict(checkpoint.metadata["config"], f"{checkpoint.path}: config")
    except KeyError:
        raise CheckpointError(f"{checkpoint.path} holds no settings") from None
    if name is not None and load_recipe(name).name != saved.name:
        raise ValueError(
            f"{run_folder_of(checkpoint.path)} is a run of recipe {saved.name}, not of {name}: "
            "leave the recipe out"
        )
    return saved


def check_resumable(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Raise ValueError where the recipe would make another run of the checkpoint's.

    Args:
        recipe: settings; lengths may be in epochs, of the checkpoint's images.
    """
    folder = run_folder_of(checkpoint.path)
    images = checkpoint.metadata.get("data", {}).get("images")
    if images is not None:
        recipe = recipe.in_steps(images)
    before = by_name(saved_recipe(checkpoint, None))
    for key, value in by_name(recipe).items():
        if value != before[key] and key not in RESUMABLE:
            raise ValueError(
                f"{key} is {before[key]} in the run of {folder} and cannot become {value}: that "
                f"would be another run. May change: {', '.join(RESUMABLE)}"
            )


def by_name(recipe: Recipe) -> dict[str, object]:
    """Settings by dotted name."""
    return {
        f"{table}.{key}": value
        for table, entries in recipe_to_dict(recipe).items()
        if isinstance(entries, dict)
        for key, value in entries.items()
    }


def resume_command(path: Path) -> str:
    """The command line that goes on from a run's folder or one of its checkpoints.

    Under torchrun it is torchrun's, with as many machines and processes as now.
    """
    words = ["ijepa", "pretrain"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        machines = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        words = ["torchrun", *(["--nnodes", str(machines)] if machines > 1 else [])]
        words += ["--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
        words += ["-m", "ijepa.cli", "pretrain"]
    return shlex.join([*words, "--resume", str(path)])


def how_to_continue(run_folder: Path, before_step: int | None = None) -> str:
    """What a failed run ends with: its last good checkpoint and the command that goes on from it.

    Args:
        before_step: only earlier checkpoints are good.
    """
    good = None
    try:
        latest = find_checkpoint(run_folder)
        folders = checkpoint_folders(latest.parent)
        earlier = [
            folder
            for folder in folders[: folders.index(latest) + 1]
            if before_step is None or read_metadata(folder)["step"] < before_step
        ]
        good = earlier[-1] if earlier else None
    except (CheckpointError, ValueError):
        latest = None
    if good is None:
        rest = "" if latest is None else f" from before step {before_step}"
        return f"No checkpoint{rest} was written: there is nothing to continue from."
    command = resume_command(run_folder if good == latest else good)
    return f"Last good: step {read_metadata(good)['step']}, continue with\n  {command}"
