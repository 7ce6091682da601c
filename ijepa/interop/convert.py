"""`ijepa convert`: an encoder, or all three networks, in the form that another program reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ijepa.config import VIT_SIZES, ModelConfig
from ijepa.disk import written_aside
from ijepa.interop.flat import check_tensors, write_safetensors
from ijepa.interop.onnx_file import write_onnx
from ijepa.interop.released import load_official, write_released
from ijepa.interop.runs import load_run
from ijepa.interop.sources import Network, is_of_a_run, read_encoder
from ijepa.interop.transformers_folder import is_transformers_folder, write_transformers

Form = Literal["released", "timm", "transformers", "safetensors", "onnx"]

# form -> what its files may end in; transformers' is a folder
_SUFFIXES = {
    "released": (".tar", ".pth"),
    "timm": (".safetensors", ".pth"),
    "safetensors": (".safetensors",),
    "onnx": (".onnx",),
}


def convert(
    source: str | os.PathLike,
    out: str | os.PathLike,
    to: Form,
    *,
    network: Network = "target_encoder",
    num_heads: int | None = None,
) -> ModelConfig:
    """Write what `source` holds to `out`, which must not exist, as float32.

    Args:
        source: as for `load_pretrained`.
        out: a folder for "transformers", else a file.
        to: "released", all three networks as the released code saves them; "timm", a state dict
            for its `vit_*` without a class token; "transformers", a folder for `IJepaModel`;
            "safetensors", an encoder that describes itself; "onnx", an encoder to be run.
        network: which encoder; not for "released".
        num_heads: of a source that does not say how many it has.

    Returns:
        The sizes.

    Raises:
        FileExistsError: there is something at `out`.
        ValueError: the source as for `load_pretrained`; or it lacks what is asked for.
        ImportError: "onnx" without its packages.
    """
    source, out = Path(source).expanduser(), Path(out).expanduser()
    _check_out(out, to)
    if to == "released":
        model = _all_networks(source, num_heads)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_released(out, model)
        return model.config
    files = read_encoder(source, network, num_heads)
    if files.class_names:
        raise ValueError(
            f"{source} is a fine-tuned classifier, whose head has no place in these forms: convert "
            "the run that it began with"
        )
    # Copies: a run's tensors are mapped from its file.
    state = {name: tensor.float().clone() for name, tensor in files.states[network].items()}
    check_tensors(source, files.config, state)
    out.parent.mkdir(parents=True, exist_ok=True)
    _WRITERS[to](out, files.config, state)
    return files.config


def _check_out(out: Path, to: Form) -> None:
    if to != "transformers" and to not in _SUFFIXES:
        forms = ", ".join(["transformers", *_SUFFIXES])
        raise ValueError(f"to must be one of {forms}, got {to!r}")
    if out.exists():
        raise FileExistsError(f"there is something at {out} already: give another name")
    if to != "transformers" and out.suffix not in _SUFFIXES[to]:
        raise ValueError(f"a file of {to} ends in {' or '.join(_SUFFIXES[to])}, got {out.name!r}")


def _all_networks(source: Path, num_heads: int | None):
    if not source.exists():
        raise FileNotFoundError(f"nothing at {source}")
    if is_transformers_folder(source) or (
        source.suffix == ".safetensors" and not is_of_a_run(source)
    ):
        raise ValueError(
            f"{source} holds one encoder, and a released checkpoint has three networks: convert a "
            "run or another released checkpoint"
        )
    if is_of_a_run(source):
        return load_run(source if source.is_dir() else source.parent)
    return load_official(source, num_heads=num_heads)


def _write_timm(path: Path, config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    if path.suffix == ".safetensors":
        write_safetensors(path, config, state)
        return
    with written_aside(path) as aside:
        torch.save(dict(state), aside)


_WRITERS: dict[str, Callable[[Path, ModelConfig, dict[str, Tensor]], None]] = {
    "timm": _write_timm,
    "transformers": write_transformers,
    "safetensors": write_safetensors,
    "onnx": write_onnx,
}


def model_name(config: ModelConfig) -> str:
    """"ViT-H/14 at 224x224", or the sizes where the field has no name for them."""
    at = "x".join(map(str, config.image_size))
    patch = config.patch_size[0] if len(set(config.patch_size)) == 1 else config.patch_size
    for name, sizes in VIT_SIZES.items():
        if (config.width, config.depth, config.heads) == tuple(
            sizes[key] for key in ("width", "depth", "heads")
        ):
            return f"ViT-{name}/{patch} at {at}"
    sizes_read = f"width {config.width}, depth {config.depth}, {config.heads} heads"
    return f"{sizes_read}, patch {patch} at {at}"


def how_to_open(out: Path, to: Form, config: ModelConfig) -> str:
    """The line of code that reads it."""
    if to == "released":
        return f"ijepa.load_official({str(out)!r})"
    if to == "transformers":
        return f"transformers.IJepaModel.from_pretrained({str(out)!r})"
    if to == "onnx":
        return f"onnxruntime.InferenceSession({str(out)!r}).run(None, {{'images': uint8}})"
    if to == "safetensors":
        return f"ijepa.load_pretrained({str(out)!r})"
    return (
        "timm.models.VisionTransformer("
        f"img_size={config.image_size}, patch_size={config.patch_size[0]}, "
        f"embed_dim={config.width}, depth={config.depth}, num_heads={config.heads}, "
        f"mlp_ratio={config.mlp_ratio:.6g}, class_token=False, global_pool='avg', fc_norm=False, "
        "num_classes=0).load_state_dict(...)"
    )
