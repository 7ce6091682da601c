"""The options of the commands that use an encoder; nothing of torch is imported to parse them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

Source = Annotated[Positional[str], arg(metavar="SOURCE")]


@dataclass(frozen=True)
class EncoderOptions:
    """Which encoder, and where it computes."""

    network: Literal["target_encoder", "context_encoder"] = "target_encoder"
    """of a pretrained model; the paper evaluates the target encoder"""
    num_heads: int | None = None
    """of a released checkpoint of a width that no ViT has"""
    image_size: int | None = None
    """side in pixels, in whole patches: positions are resized; default: as pretrained"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 by autocast"""
    batch_size: int = 64
    """images computed at once, on each rank"""
    workers: int | None = None
    """processes that decode images; default: 1 on the CPU, the cores beside a GPU"""


@dataclass(frozen=True)
class EmbedOptions:
    """Features of every image below FOLDER, into OUT/features.npy (n, D), float32.

    names.txt has a line for each row, embed.json says what the features are of and which files
    could not be read. Stopped or killed, the same command goes on where it was. Under torchrun
    (torchrun --nproc-per-node 8 -m ijepa.cli embed ...) all ranks share the images.
    """

    source: Source
    """a run's folder, one of its checkpoints, or a released .pth.tar"""
    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """of images, nested or not"""
    out: Path
    """folder to write into"""
    layers: Literal["last", "last4"] = "last"
    """the last block, or the last four concatenated"""
    encoder: Annotated[EncoderOptions, arg(name="")] = EncoderOptions()


@dataclass(frozen=True)
class NeighboursOptions:
    """The images of an embedded folder nearest to a query, printed and drawn."""

    embedded: Annotated[Positional[Path], arg(metavar="DIR")]
    """what `ijepa embed` wrote"""
    query: Annotated[Positional[Path], arg(metavar="QUERY")]
    """an image file"""
    count: int = 11
    """neighbours to show"""
    out: Path | None = None
    """picture to write; default: neighbours.png beside the features"""
    source: str | None = None
    """where the encoder is now; default: where it was when the folder was embedded"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
