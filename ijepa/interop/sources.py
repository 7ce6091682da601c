"""Where a pretrained encoder can come from: one line for each kind of source.

A kind says whether a path is one of its own and reads it. `load_pretrained` asks them in turn.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ijepa.config import ModelConfig
from ijepa.data.views import Transform
from ijepa.evaluate.pretrained import PretrainedEncoder
from ijepa.interop.classifiers import read_classifier
from ijepa.interop.flat import PATCH_WEIGHT, description, read_flat, read_safetensors
from ijepa.interop.released import NETWORKS, read_networks, read_torch_file
from ijepa.interop.runs import read_run
from ijepa.interop.transformers_folder import is_transformers_folder, read_transformers
from ijepa.train.checkpoint import METADATA
from ijepa.train.from_recipe import viewing_transform

Network = Literal["target_encoder", "context_encoder"]


@dataclass(frozen=True)
class EncoderFiles:
    """What a source holds.

    Attributes:
        config: sizes and statistics.
        states: "target_encoder", "context_encoder" or one of them -> its tensors by released name.
        transform: what images are to look like, None where the source says nothing of it.
        class_names: of a classifier, whose states hold a head.
    """

    config: ModelConfig
    states: dict[str, dict[str, Tensor]]
    transform: Transform | None = None
    class_names: tuple[str, ...] = ()


class Kind(NamedTuple):
    """A kind of source.

    Attributes:
        what: in words, for messages.
        recognises: whether a path is one, by names alone.
        read: (path, heads where the user says so) -> what it holds.
    """

    what: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path, int | None], EncoderFiles]


def load_pretrained(
    source: str | os.PathLike,
    *,
    network: Network = "target_encoder",
    num_heads: int | None = None,
    device: str | torch.device = "cpu",
) -> PretrainedEncoder:
    """An encoder to embed images with: in evaluation mode, without gradients, float32.

    Args:
        source: the folder of a run, one of its checkpoints, a released `.pth.tar` file, or an
            encoder alone: a folder of transformers, a `.safetensors` file, or a state dict of
            timm's. The run may be one of fine-tuning: such an encoder has a head, and `classify`.
        network: the paper evaluates the target encoder (appendix A.2).
        num_heads: of a source that does not say how many it has; default: the ViT of the same
            width's.
        device: where the encoder goes.

    Raises:
        FileNotFoundError: there is nothing at `source`.
        ValueError: it is damaged or none of these, or holds no such network.
    """
    files = read_encoder(source, network, num_heads)
    state = {name: tensor.float().clone() for name, tensor in files.states[network].items()}
    encoder = PretrainedEncoder(files.config, state, files.transform, files.class_names)
    return encoder.to(device)


def read_encoder(
    source: str | os.PathLike, network: Network = "target_encoder", num_heads: int | None = None
) -> EncoderFiles:
    """What a source holds, the `network` among it; arguments and errors of `load_pretrained`."""
    if network not in get_args(Network):
        raise ValueError(f"network must be one of {', '.join(get_args(Network))}, got {network!r}")
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"nothing at {path}: a source is {_kinds()}")
    kind = next((kind for kind in KINDS if kind.recognises(path)), None)
    if kind is None:
        raise ValueError(f"{path} is no source of an encoder: that would be {_kinds()}")
    files = kind.read(path, num_heads)
    if network not in files.states:
        raise ValueError(f"{path} holds no {network}, but {', '.join(files.states)}")
    if num_heads not in (None, files.config.heads):
        raise ValueError(f"{path} says that it has {files.config.heads} heads, not {num_heads}")
    return files


def _kinds() -> str:
    return ", or ".join(kind.what for kind in KINDS)


def is_of_a_run(path: Path) -> bool:
    """Whether the path is a run's folder or a part of one, by names alone."""
    folder = path if path.is_dir() else path.parent
    if path.is_file() and path.suffix != ".safetensors":
        return False
    return (
        (folder / METADATA).exists()
        or (folder / "checkpoints").is_dir()
        or folder.name == "checkpoints"
    )


def _read_run(path: Path, _: int | None) -> EncoderFiles:
    path = path if path.is_dir() else path.parent
    classifier = read_classifier(path)
    if classifier is not None:
        return EncoderFiles(
            classifier.config,
            {"target_encoder": classifier.state},
            classifier.transform,
            classifier.class_names,
        )
    recipe, weights, _folder = read_run(path)
    states = {
        name: {
            key.removeprefix(f"{name}."): tensor
            for key, tensor in weights.items()
            if key.startswith(f"{name}.")
        }
        for name in get_args(Network)
    }
    # Photographs are looked at as the paper does; of a rendered image all of it.
    transform = None if recipe.data.source == "folder" else viewing_transform(recipe)
    return EncoderFiles(recipe.model, states, transform)


def _read_torch_file(path: Path, num_heads: int | None) -> EncoderFiles:
    """A released checkpoint, or one encoder's tensors as timm saves them."""
    checkpoint = read_torch_file(path)
    if PATCH_WEIGHT in checkpoint:
        return _alone(*read_flat(path, checkpoint, num_heads))
    config, states = read_networks(path, checkpoint, num_heads)
    return EncoderFiles(config, {NETWORKS[name]: state for name, state in states.items()})


def _read_safetensors(path: Path, num_heads: int | None) -> EncoderFiles:
    tensors, metadata = read_safetensors(path)
    return _alone(*read_flat(path, tensors, num_heads, description(metadata)))


def _read_transformers(path: Path, _: int | None) -> EncoderFiles:
    return _alone(*read_transformers(path))


def _alone(config: ModelConfig, state: dict[str, Tensor]) -> EncoderFiles:
    """Of a source with one encoder, which is what everybody exports: the target encoder."""
    return EncoderFiles(config, {"target_encoder": state})


KINDS = (
    Kind("the folder of a run or one of its checkpoints", is_of_a_run, _read_run),
    Kind("a folder of transformers (IJepaModel)", is_transformers_folder, _read_transformers),
    Kind(
        "a .safetensors file of an encoder (ours or timm's)",
        lambda path: path.is_file() and path.suffix == ".safetensors",
        _read_safetensors,
    ),
    Kind("a released .pth.tar file, or timm's .pth", Path.is_file, _read_torch_file),
)
