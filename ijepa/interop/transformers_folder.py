"""Folders of Hugging Face's transformers with an `IJepaModel`: read and written without it.

Such a folder holds `config.json`, `model.safetensors` (or several with an index) and
`preprocessor_config.json`. Its tensors have transformers' names of old, which version 5 still reads
and writes: queries, keys and values apart, in that order rows of ours.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ijepa.config import ModelConfig
from ijepa.interop.flat import check_tensors, encoder_config, read_safetensors
from ijepa.vit import LAYER_NORM_EPS

CONFIG = "config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PREPROCESSOR = "preprocessor_config.json"
_PREFIX = "ijepa."  # of a classifier's encoder
_HEADS = ("classifier.", "pooler.")  # what is no part of the encoder
_BICUBIC = 3  # Pillow's number

_OUTER = {
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_INNER = {
    "layernorm_before": "norm1",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_QKV = ("query", "key", "value")


def _names(depth: int) -> dict[str, str | tuple[str, ...]]:
    """Our name of every tensor -> theirs, of qkv three."""
    names: dict[str, str | tuple[str, ...]] = {ours: theirs for theirs, ours in _OUTER.items()}
    for block in range(depth):
        for kind in ("weight", "bias"):
            at = f"encoder.layer.{block}"
            for theirs, ours in _INNER.items():
                names[f"blocks.{block}.{ours}.{kind}"] = f"{at}.{theirs}.{kind}"
            names[f"blocks.{block}.attn.qkv.{kind}"] = tuple(
                f"{at}.attention.attention.{part}.{kind}" for part in _QKV
            )
    return names


def is_transformers_folder(path: Path) -> bool:
    """Whether the folder is one of transformers, by the names of its files."""
    return (path / CONFIG).is_file() and any((path / n).is_file() for n in (_WEIGHTS, _INDEX))


def read_transformers(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Sizes and tensors, under the released names, of an I-JEPA in transformers' form.

    Raises:
        ValueError: the folder is of another model or damaged; tensors are missing, unknown or of
            another shape, all of which are named.
    """
    described = _json(path / CONFIG)
    kind = described.get("model_type")
    if kind != "ijepa":
        raise ValueError(f"{path} holds a {kind!r} of transformers, not an 'ijepa'")
    eps = described.get("layer_norm_eps", 1e-12)
    if eps != LAYER_NORM_EPS:
        warnings.warn(
            f"{path} says layer_norm_eps = {eps}; the released networks have {LAYER_NORM_EPS}, "
            "which is taken here: features differ in the last digits",
            stacklevel=2,
        )
    state = _to_ours(path, _tensors(path))
    known: dict[str, Any] = {}
    if "image_size" in described:
        known["image_size"] = _pair(path, "image_size", described["image_size"])
    if (path / _PREPROCESSOR).is_file():
        statistics = _json(path / _PREPROCESSOR)
        for name in ("image_mean", "image_std"):
            if statistics.get(name) is not None:
                known[name] = tuple(float(value) for value in statistics[name])
        if known.get("image_mean") == (0.5, 0.5, 0.5):
            warnings.warn(
                f"{path / _PREPROCESSOR} says image_mean = 0.5, as transformers' converter wrote "
                "for the released networks, which saw ImageNet's 0.485, 0.456, 0.406: correct the "
                "file if this is one of them",
                stacklevel=2,
            )
    config = encoder_config(path, state, described.get("num_attention_heads", 12), **known)
    check_tensors(path, config, state)
    return config, state


def _to_ours(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    theirs = {
        name.removeprefix(_PREFIX): tensor
        for name, tensor in tensors.items()
        if not name.startswith(_HEADS)
    }
    numbers = [int(name.split(".")[2]) for name in theirs if name.startswith("encoder.layer.")]
    state: dict[str, Tensor] = {}
    missing = []
    for ours, names in _names(1 + max(numbers, default=0)).items():
        parts = (names,) if isinstance(names, str) else names
        absent = [name for name in parts if name not in theirs]
        missing += [f"{name} is missing" for name in absent]
        if not absent:
            taken = [theirs.pop(name) for name in parts]
            state[ours] = taken[0] if len(taken) == 1 else torch.cat(taken)
    wrong = missing + [f"{name} is unknown" for name in theirs]
    if wrong:
        raise ValueError(f"{path} is no complete IJepaModel:\n  " + "\n  ".join(wrong))
    return state


def _tensors(path: Path) -> dict[str, Tensor]:
    """Of the one file, or of those that the index names, each of which must lie in the folder."""
    if (path / _WEIGHTS).is_file():
        return read_safetensors(path / _WEIGHTS)[0]
    placed = _json(path / _INDEX).get("weight_map")
    if not isinstance(placed, dict):
        raise ValueError(f"{path / _INDEX} names no files (weight_map)")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(map(str, placed.values()))):
        if Path(name).name != name:
            raise ValueError(f"{path / _INDEX} names {name!r}, which is not in the folder")
        tensors |= read_safetensors(path / name)[0]
    return tensors


def write_transformers(path: Path, config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    """A folder that `IJepaModel.from_pretrained` and `AutoImageProcessor.from_pretrained` read.

    Raises:
        FileExistsError: there is something at `path`.
    """
    if path.exists():
        raise FileExistsError(f"there is something at {path} already: give another folder")
    tensors: dict[str, Tensor] = {}
    for ours, theirs in _names(config.depth).items():
        if isinstance(theirs, str):
            tensors[theirs] = state[ours].contiguous()
        else:
            tensors |= {
                name: part.contiguous()
                for name, part in zip(theirs, state[ours].chunk(3), strict=True)
            }
    height, width = config.image_size
    described = {
        "architectures": ["IJepaModel"],
        "model_type": "ijepa",
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": round(config.width * config.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": height if height == width else [height, width],
        "patch_size": (
            config.patch_size[0] if len(set(config.patch_size)) == 1 else list(config.patch_size)
        ),
        "num_channels": config.channels,
        "qkv_bias": True,
        "torch_dtype": "float32",
    }
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }
    aside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # of a conversion that was killed
    aside.mkdir(parents=True)
    try:
        save_file(tensors, aside / _WEIGHTS, metadata={"format": "pt"})
        for name, content in ((CONFIG, described), (_PREPROCESSOR, preprocessor)):
            (aside / name).write_text(json.dumps(content, indent=2) + "\n")
        aside.rename(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _pair(path: Path, name: str, value: object) -> tuple[int, int]:
    sides = [value, value] if isinstance(value, int) else value
    if not isinstance(sides, list) or len(sides) != 2 or not all(isinstance(s, int) for s in sides):
        raise ValueError(f"{path / CONFIG}: {name} must be one or two whole numbers, got {value!r}")
    return sides[0], sides[1]


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no object, but a {type(content).__name__}")
    return content
