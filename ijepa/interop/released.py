"""Checkpoints of the released I-JEPA code.

A released `.pth.tar` holds `encoder`, `predictor` and `target_encoder`, each with the prefix
`module.`, beside the optimiser's state. It names neither image size nor head count: sizes are
read off the tensors, and the heads follow from the width.
"""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ijepa.config import VIT_SIZES, ModelConfig
from ijepa.disk import written_aside
from ijepa.interop.unloaded import networks_without_weights
from ijepa.model import IJEPA
from ijepa.train.checkpoint import METADATA

_NAMED = 8  # entries of a foreign file that are named

# Released name of each network -> ours.
NETWORKS = {
    "encoder": "context_encoder",
    "predictor": "predictor",
    "target_encoder": "target_encoder",
}


def load_official(path: str | os.PathLike, *, num_heads: int | None = None) -> IJEPA:
    """All three networks of a released checkpoint.

    Args:
        path: the `.pth.tar` file; it is read with `weights_only=True`.
        num_heads: of encoder and predictor alike; default: the ViT of the same width's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or something else, a checkpoint of this program among it; or
            tensors are missing, unknown or of the wrong shape, all of which are named.
    """
    config, states = read_released(Path(path), num_heads)
    model = networks_without_weights(config)
    for name, ours in NETWORKS.items():
        model.get_submodule(ours).load_state_dict(states[name], assign=True)
    return model


def read_released(
    path: Path, num_heads: int | None = None
) -> tuple[ModelConfig, dict[str, dict[str, Tensor]]]:
    """The sizes of a released checkpoint, and released network name -> its tensors in float32.

    Raises:
        FileNotFoundError, ValueError: see `load_official`.
    """
    _refuse_own(path)
    return read_networks(path, read_torch_file(path), num_heads)


def read_networks(
    path: Path, checkpoint: Mapping, num_heads: int | None = None
) -> tuple[ModelConfig, dict[str, dict[str, Tensor]]]:
    """`read_released` of what the file at `path` held."""
    absent = [name for name in NETWORKS if not isinstance(checkpoint.get(name), Mapping)]
    if absent:
        held = [str(name) for name in checkpoint]
        named = ", ".join(held[:_NAMED]) + (f", ... ({len(held)})" if held[_NAMED:] else "")
        raise ValueError(
            f"{path} is no released I-JEPA checkpoint: it lacks {', '.join(absent)}"
            f" (it holds {named or 'nothing'})"
        )
    states = {name: _clean(checkpoint[name]) for name in NETWORKS}
    config = _read_config(path, states["encoder"], states["predictor"], num_heads)
    model = networks_without_weights(config)
    mismatches = [
        mismatch
        for name, ours in NETWORKS.items()
        for mismatch in _mismatches(name, model.get_submodule(ours).state_dict(), states[name])
    ]
    if mismatches:
        raise ValueError(f"{path} does not fit its own sizes:\n  " + "\n  ".join(mismatches))
    return config, states


def write_released(path: Path, model: IJEPA) -> None:
    """All three networks as a `.pth.tar` that the released code and `load_official` read."""
    content: dict[str, object] = {
        name: {
            f"module.{key}": tensor.detach().float().cpu().contiguous()
            for key, tensor in model.get_submodule(ours).state_dict().items()
        }
        for name, ours in NETWORKS.items()
    }
    with written_aside(path) as aside:
        torch.save(content | {"epoch": 0}, aside)


def _refuse_own(path: Path) -> None:
    """Raise ValueError where the path is a run of this program or a part of one."""
    folder = path if path.is_dir() else path.parent
    of_a_run = (folder / METADATA).exists() or (folder / "checkpoints").is_dir()
    if path.is_dir() and not of_a_run:
        raise ValueError(f"{path} is a folder: give the .pth.tar file of a released checkpoint")
    if path.is_dir() or (of_a_run and path.suffix == ".safetensors"):
        raise ValueError(
            f"{path} is a checkpoint of this program, not a released one: "
            f"ijepa.load_run({str(folder)!r}) opens it"
        )
    if path.suffix == ".safetensors" and path.is_file():
        raise ValueError(
            f"{path} holds tensors without their settings: of a checkpoint of this program give "
            "the whole folder to ijepa.load_run; released checkpoints are .pth.tar files"
        )


def read_torch_file(path: Path) -> Mapping:
    """What a file of `torch.save` holds, read with `weights_only=True`.

    Raises:
        FileNotFoundError, ValueError: nothing there; damaged, or no mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged or no PyTorch checkpoint: {reason}") from error
    if not isinstance(checkpoint, Mapping):
        kind = type(checkpoint).__name__
        raise ValueError(f"{path} is no released I-JEPA checkpoint: it holds a {kind}")
    return checkpoint


def _clean(state: Mapping) -> dict[str, Tensor]:
    """Without the prefix that distributed training left, in float32."""
    return {
        name.removeprefix("module."): value.float() if isinstance(value, Tensor) else value
        for name, value in state.items()
    }


def _read_config(
    path: str | os.PathLike,
    encoder: Mapping[str, Tensor],
    predictor: Mapping[str, Tensor],
    num_heads: int | None,
) -> ModelConfig:
    """The model's sizes, from the shapes of its tensors."""

    def shape(network: str, state: Mapping[str, Tensor], name: str, ndim: int) -> torch.Size:
        value = state.get(name)
        if not isinstance(value, Tensor) or value.ndim != ndim:
            found = "is missing" if value is None else "is no such tensor"
            raise ValueError(f"{path}: {network}.{name} with {ndim} dimensions {found}")
        return value.shape

    width, channels, *patch_size = shape("encoder", encoder, "patch_embed.proj.weight", 4)
    patches = shape("encoder", encoder, "pos_embed", 3)[1]
    hidden = shape("encoder", encoder, "blocks.0.mlp.fc1.weight", 2)[0]
    predictor_width = shape("predictor", predictor, "predictor_embed.weight", 2)[0]
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"{path}: encoder.pos_embed has {patches} rows, which is no square grid")
    if num_heads is None:
        num_heads = next((s["heads"] for s in VIT_SIZES.values() if s["width"] == width), None)
        if num_heads is None:
            raise ValueError(f"{path}: no ViT of width {width} is known, give num_heads")
    for name, size in (("encoder", width), ("predictor", predictor_width)):
        if num_heads < 1 or size % num_heads:
            raise ValueError(f"{path}: {name} width {size} has no {num_heads} heads")
    # What the pixels were normalised with is not recorded: ImageNet's statistics for colour images.
    mean, std = ModelConfig.image_mean, ModelConfig.image_std
    if channels != len(mean):
        mean, std = (0.0,) * channels, (1.0,) * channels
    return ModelConfig(
        image_size=(side * patch_size[0], side * patch_size[1]),
        channels=channels,
        patch_size=(patch_size[0], patch_size[1]),
        width=width,
        depth=_depth(encoder, "blocks"),
        heads=num_heads,
        mlp_ratio=hidden / width,
        predictor_width=predictor_width,
        predictor_depth=_depth(predictor, "predictor_blocks"),
        predictor_heads=num_heads,
        image_mean=mean,
        image_std=std,
    )


def _depth(state: Mapping[str, Tensor], blocks: str) -> int:
    """One more than the highest block number, at least 1."""
    numbers = [re.match(rf"{blocks}\.(\d+)\.", name) for name in state]
    return 1 + max((int(match[1]) for match in numbers if match), default=0)


def _mismatches(network: str, expected: Mapping, found: Mapping) -> list[str]:
    """One line for each tensor that is missing, unknown or of another shape."""
    lines = [f"{network}.{name} is missing" for name in expected if name not in found]
    lines += [f"{network}.{name} is unknown" for name in found if name not in expected]
    for name in expected:
        if name not in found:
            continue
        shape = tuple(getattr(found[name], "shape", ()))
        if shape != tuple(expected[name].shape):
            wanted = tuple(expected[name].shape)
            lines.append(f"{network}.{name} must have shape {wanted}, got {shape}")
    return lines
