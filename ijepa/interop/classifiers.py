"""Checkpoints of fine-tuning: an encoder with a head, its classes, and what it looks at."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ijepa.config import ModelConfig
from ijepa.data.views import CenterCrop, Squash, Transform
from ijepa.recipes import recipe_from_dict
from ijepa.train.checkpoint import CheckpointError, find_checkpoint, load_weights, read_metadata

_VIEWS = {"CenterCrop": CenterCrop, "Squash": Squash}


@dataclass(frozen=True)
class ClassifierFiles:
    """What a checkpoint of fine-tuning holds; the tensors are mapped from its file."""

    config: ModelConfig
    state: dict[str, Tensor]
    transform: Transform
    class_names: tuple[str, ...]


def describe_classifier(
    config: ModelConfig, class_names: tuple[str, ...], transform: Transform
) -> dict[str, Any]:
    """JSON values for a checkpoint's metadata, under "classifier"."""
    kind = type(transform).__name__
    if kind not in _VIEWS:
        raise ValueError(f"a classifier looks at one of {', '.join(_VIEWS)}, got {transform}")
    return {
        "model": dataclasses.asdict(config),
        "class_names": list(class_names),
        "view": {"kind": kind, **dataclasses.asdict(transform)},  # type: ignore[call-overload]
    }


def read_classifier(path: Path) -> ClassifierFiles | None:
    """The classifier in a run of fine-tuning or one of its checkpoints; None of another run.

    Raises:
        CheckpointError: nothing there, or something damaged.
    """
    if "classifier" not in read_metadata(find_checkpoint(path)):
        return None
    folder, metadata, weights = load_weights(path)
    described = metadata["classifier"]
    try:
        view = dict(described["view"])
        kind = _VIEWS[view.pop("kind")]
        return ClassifierFiles(
            recipe_from_dict({"model": described["model"]}, f"{folder}: classifier").model,
            weights,
            kind(**{**view, "size": tuple(view["size"])}),
            tuple(str(name) for name in described["class_names"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} describes no classifier: {error!r}") from None
