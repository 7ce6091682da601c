"""Checkpoints of fine-tuning, in the format of pretraining's, and what a resumed run must keep."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ijepa.data.identity import source_identity
from ijepa.downstream.finetune.presets import FinetuneSettings
from ijepa.downstream.finetune.trainer import FinetuneTrainer
from ijepa.downstream.options import EncoderOptions, FinetuneOptions
from ijepa.evaluate.tasks import Task
from ijepa.interop.classifiers import describe_classifier
from ijepa.train.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    random_states,
    save_checkpoint,
    set_random_states,
)


def save(
    folder: Path,
    trainer: FinetuneTrainer,
    options: FinetuneOptions,
    data_id: dict[str, Any],
) -> None:
    """A checkpoint after `trainer.done` steps; the newest two are kept.

    Raises:
        NotWritten: no room; the checkpoints of before are as they were.
    """
    network = trainer.network
    save_checkpoint(
        folder,
        trainer.done,
        weights=dict(network.state_dict()),
        state={"trainer": trainer.state_dict(), "random": random_states()},
        metadata={
            "classifier": describe_classifier(
                network.config, network.class_names, network.transform
            ),
            "finetune": options_to_dict(options),
            "settings": dataclasses.asdict(trainer.settings),
            "data": data_id,
        },
    )


def load(folder: Path) -> tuple[Checkpoint, FinetuneOptions, FinetuneSettings]:
    """The latest checkpoint of a run of fine-tuning, and what it was started with.

    Raises:
        CheckpointError: nothing there, damaged, or of another kind.
    """
    checkpoint = load_checkpoint(folder)
    try:
        options = options_from_dict(checkpoint.metadata["finetune"])
        settings = FinetuneSettings(**checkpoint.metadata["settings"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.path} is no checkpoint of fine-tuning ({error}); one of pretraining goes "
            "on with ijepa pretrain --resume"
        ) from None
    return checkpoint, options, settings


def restore(checkpoint: Checkpoint, trainer: FinetuneTrainer) -> None:
    """Weights, optimiser, step and random states of a checkpoint.

    Raises:
        CheckpointError: it does not fit.
    """
    try:
        trainer.network.load_state_dict(checkpoint.weights)
        trainer.load_state_dict(checkpoint.state["trainer"])
        set_random_states(checkpoint.state["random"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{checkpoint.path} does not fit this run: {error}") from None


def data_identity(task: Task) -> dict[str, Any]:
    """What the data of a run are known by."""
    return {
        "classes": task.classes,
        "images": len(task.train),
        "images_hash": source_identity(task.train.source),
    }


def check_same_data(checkpoint: Checkpoint, data_id: dict[str, Any]) -> None:
    """Raise CheckpointError where a run would go on with other data."""
    saved = checkpoint.metadata.get("data", {})
    for name, value in data_id.items():
        if saved.get(name) != value:
            raise CheckpointError(
                f"{checkpoint.path} was fine-tuned on other data: {name} is {saved.get(name)!r} "
                f"there and {value!r} here"
            )


def options_to_dict(options: FinetuneOptions) -> dict[str, Any]:
    """As JSON values."""
    values = dataclasses.asdict(options)
    return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


def options_from_dict(values: dict[str, Any]) -> FinetuneOptions:
    """The inverse of `options_to_dict`."""
    paths = ("path", "out", "list", "output")
    typed: dict[str, Any] = {
        name: Path(value) if name in paths and value is not None else value
        for name, value in values.items()
    }
    typed["encoder"] = EncoderOptions(**typed["encoder"])
    return FinetuneOptions(**typed)
