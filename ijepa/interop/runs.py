"""Checkpoints of runs of this program."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from ijepa.config import Recipe
from ijepa.interop.unloaded import networks_without_weights
from ijepa.model import IJEPA
from ijepa.recipes import recipe_from_dict
from ijepa.train.checkpoint import CheckpointError, load_weights


def load_run(path: str | os.PathLike) -> IJEPA:
    """All three networks of a run of this program.

    Args:
        path: the run's folder (its latest checkpoint is taken) or one of its checkpoints.

    Raises:
        CheckpointError: nothing there, or something damaged or foreign.
        ValueError: settings that this version does not know.
    """
    recipe, weights, folder = read_run(Path(path))
    model = networks_without_weights(recipe.model)
    try:
        # Copies: the checkpoint's are mapped from its file.
        copies = {name: tensor.clone() for name, tensor in weights.items()}
        model.load_state_dict(copies, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{folder} does not fit its own settings: {error}") from None
    return model


def read_run(path: Path) -> tuple[Recipe, dict[str, Tensor], Path]:
    """Recipe, tensors of the three networks by prefixed name, and the checkpoint's folder.

    The tensors are mapped from the file: copy what is to be kept.

    Raises:
        CheckpointError, ValueError: see `load_run`.
    """
    folder, metadata, weights = load_weights(path)
    if "classifier" in metadata:
        raise CheckpointError(
            f"{folder} is a fine-tuned classifier: ijepa.load_pretrained opens it"
        )
    if "config" not in metadata:
        raise CheckpointError(f"{folder} holds no settings")
    return recipe_from_dict(metadata["config"], f"{folder}: config"), weights, folder
