"""Files that hold one encoder's tensors under the released names: ours, and timm's.

timm's `vit_*_patch*` without a class token (`class_token=False, global_pool="avg", fc_norm=False`)
calls its tensors as the released code does, so one file serves both. A safetensors file that
`ijepa convert` wrote says in its metadata how many heads there are and how pixels are normalised;
of any other file the heads follow from the width, as of a released checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ijepa.config import VIT_SIZES, ModelConfig
from ijepa.disk import written_aside

PATCH_WEIGHT = "patch_embed.proj.weight"  # by which such a file is known
_DESCRIPTION = "ijepa"  # entry of the metadata


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an encoder."""
    width, hidden = config.width, round(config.width * config.mlp_ratio)
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, config.grid[0] * config.grid[1], width),
        PATCH_WEIGHT: (width, config.channels, *config.patch_size),
        "patch_embed.proj.bias": (width,),
    }
    layers = {
        "norm1": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width),
        "norm2": (width,), "mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden),
    }  # fmt: skip
    for block in range(config.depth):
        for layer, shape in layers.items():
            shapes[f"blocks.{block}.{layer}.weight"] = shape
            shapes[f"blocks.{block}.{layer}.bias"] = shape[:1]
    return shapes | {"norm.weight": (width,), "norm.bias": (width,)}


def check_tensors(path: Path, config: ModelConfig, state: Mapping[str, object]) -> None:
    """Raise ValueError that names every tensor that is missing, unknown or of another shape."""
    wanted = expected_shapes(config)
    wrong = [f"{name} is missing" for name in wanted if name not in state]
    wrong += [f"{name} is unknown" for name in state if name not in wanted]
    for name, shape in wanted.items():
        found = tuple(getattr(state.get(name), "shape", ()))
        if name in state and found != shape:
            wrong.append(f"{name} must have shape {shape}, got {found}")
    if wrong:
        raise ValueError(f"{path} holds no encoder of its sizes:\n  " + "\n  ".join(wrong))


def encoder_config(
    path: Path, state: Mapping[str, Any], num_heads: int | None, **known: Any
) -> ModelConfig:
    """An encoder's sizes, read off its tensors.

    Args:
        num_heads: None takes those of the ViT of the same width.
        known: settings that the source says itself.

    Raises:
        ValueError: a tensor that tells a size is missing or odd, or nothing tells the heads.
    """

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        found = getattr(state.get(name), "shape", None)
        if found is None or len(found) != ndim:
            told = "is missing" if found is None else f"has shape {tuple(found)}"
            raise ValueError(f"{path}: {name} with {ndim} dimensions {told}")
        return tuple(found)

    width, channels, *patch_size = shape(PATCH_WEIGHT, 4)
    patches, hidden = shape("pos_embed", 3)[1], shape("blocks.0.mlp.fc1.weight", 2)[0]
    if "image_size" not in known:
        side = math.isqrt(patches)
        if side * side != patches:
            raise ValueError(
                f"{path}: pos_embed has {patches} rows, which is no square grid"
                + (": I-JEPA has no class token" if "cls_token" in state else "")
            )
        known["image_size"] = (side * patch_size[0], side * patch_size[1])
    if num_heads is None:
        num_heads = next((s["heads"] for s in VIT_SIZES.values() if s["width"] == width), None)
    if num_heads is None:
        raise ValueError(f"{path}: no ViT of width {width} is known, give num_heads")
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"{path}: width {width} has no {num_heads} heads")
    if channels != len(ModelConfig.image_mean):  # ImageNet's statistics are of colour images
        known = {"image_mean": (0.0,) * channels, "image_std": (1.0,) * channels} | known
    numbers = {int(name.split(".")[1]) for name in state if name.startswith("blocks.")}
    return ModelConfig(
        channels=channels,
        patch_size=(patch_size[0], patch_size[1]),
        width=width,
        depth=1 + max(numbers, default=0),
        heads=num_heads,
        mlp_ratio=hidden / width,
        predictor_width=width,  # there is no predictor: any that fits
        predictor_heads=num_heads,
        **known,
    )


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ValueError: it is damaged or none.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return tensors, opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None


def read_flat(
    path: Path, state: Mapping[str, Tensor], num_heads: int | None, described: str | None = None
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Sizes and tensors of an encoder under the released names.

    Args:
        described: what `write_safetensors` put into the metadata.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; all are named.
    """
    known: dict[str, Any] = {}
    if described is not None:
        try:
            entry = json.loads(described)
            num_heads = int(entry["heads"])
            known = {name: tuple(entry[name]) for name in ("image_size", "image_mean", "image_std")}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: its description is damaged: {error!r}") from None
    config = encoder_config(path, state, num_heads, **known)
    check_tensors(path, config, state)
    return config, dict(state)


def write_safetensors(path: Path, config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    """One encoder as a safetensors file that describes itself."""
    description = {
        "heads": config.heads, "image_size": config.image_size,
        "image_mean": config.image_mean, "image_std": config.image_std,
    }  # fmt: skip
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    with written_aside(path) as aside:
        save_file(tensors, aside, metadata={"format": "pt", _DESCRIPTION: json.dumps(description)})


def description(metadata: Mapping[str, str]) -> str | None:
    """What `write_safetensors` said, of a file that it wrote."""
    return metadata.get(_DESCRIPTION)
