"""The options of `ijepa report` and `ijepa visualize`; nothing of torch is imported to parse
them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

Device = Literal["auto", "cpu", "cuda"]
Runs = Annotated[Positional[tuple[str, ...]], arg(metavar="RUN...")]
Sources = Annotated[Positional[tuple[str, ...]], arg(metavar="SOURCE...")]
Source = Annotated[Positional[str], arg(metavar="SOURCE")]


@dataclass(frozen=True)
class ReportOptions:
    """One HTML file on some runs: curves, collapse panel, probes, pictures, settings, versions.

    It needs no network and nothing beside it. Curves of several runs are overlaid, their settings
    compared; pictures are of their latest checkpoints.
    """

    runs: Runs
    """folders of runs, finished or not"""
    out: Path | None = None
    """file to write; default: report.html in the first run's folder"""
    images: Path | None = None
    """folder of images for the pictures; default: rendered ones that were never trained on, or the
    training images"""
    no_pictures: Annotated[bool, arg(name="no-pictures")] = False
    """curves and tables alone"""
    gallery: int = 600
    """images that neighbours are looked for among"""
    seed: int = 0
    """of the choice of images"""
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class LookOptions:
    """What every picture takes."""

    out: Path = Path("pictures")
    """folder to write PNG files into"""
    images: Path | None = None
    """folder of images to look at; default: rendered ones that were never trained on, or the
    training images"""
    count: int = 6
    """images shown"""
    seed: int = 0
    """of the choice of images: they are drawn, not picked"""
    num_heads: int | None = None
    """of a released checkpoint of a width that no ViT has"""
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class MasksOptions(LookOptions):
    """Packed beside truncated masks, and how often each patch is context or target."""

    source: Source
    """a run's folder, one of its checkpoints, or a released .pth.tar"""


@dataclass(frozen=True, kw_only=True)
class PcaOptions(LookOptions):
    """Patch features of the target encoder as colours, several checkpoints side by side."""

    sources: Sources
    """runs' folders, checkpoints, or released .pth.tar files"""
    basis: Literal["one", "each"] | None = None
    """one basis for all, the default for checkpoints of one run, which share a feature space; or
    each its own, turned towards the first one's colours, the default otherwise"""
    remove_position: bool = False
    """take each position's mean over the images off first: what is left is content"""
    random_network: bool = False
    """the first one's network as initialised beside them"""


@dataclass(frozen=True, kw_only=True)
class AttentionOptions(LookOptions):
    """Where one patch of each image looks, head by head, in the target encoder."""

    source: Source
    """a run's folder, one of its checkpoints, or a released .pth.tar"""
    block: int = -1
    """of the encoder, from 0, or from the end where negative"""
    place: float = 0.5
    """of the patch that looks, along the diagonal: 0 top left, 1 bottom right"""


@dataclass(frozen=True, kw_only=True)
class PictureNeighboursOptions(LookOptions):
    """The nearest images to random ones, by each network's average-pooled target features."""

    sources: Sources
    """runs' folders, checkpoints, or released .pth.tar files"""
    gallery: int = 1000
    """images that neighbours are looked for among"""
    random_network: bool = False
    """the first one's network as initialised beside them"""


@dataclass(frozen=True, kw_only=True)
class PredictorOptions(LookOptions):
    """Where in the image, and in another, the features predicted for a target block match."""

    source: Source
    """a run's folder, one of its checkpoints, or a released .pth.tar"""


@dataclass(frozen=True, kw_only=True)
class RcdmTrainOptions:
    """Train a diffusion model that decodes pooled representations (paper section 8, appendix E).

    The same command goes on where it was stopped or killed. Needs the extra rcdm (diffusers).
    """

    source: Source
    """a run's folder, one of its checkpoints, or a released .pth.tar"""
    out: Path
    """folder of the decoder"""
    of: Literal["encoder", "predictor"] = "encoder"
    """average-pooled output of the target encoder (Figure 7), or of the predictor for one target
    block (Figure 6)"""
    preset: Literal["tiny", "compact", "released"] = "tiny"
    """32 pixels for two cores; 64 pixels; 128 pixels as released"""
    steps: int = 10_000
    """to take in all; the paper: 300,000"""
    batch_size: int = 32
    learning_rate: float = 1e-4
    save_every: int = 500
    random_network: bool = False
    """decode a network of the same sizes as initialised: what pretraining adds"""
    images: Path | None = None
    """folder of images to train on; default: those of the run"""
    workers: int = 0
    """processes that decode images"""
    num_heads: int | None = None
    """of a released checkpoint of a width that no ViT has"""
    seed: int = 0
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class RcdmSampleOptions:
    """Samples of a decoder: what they share is in the representation, what varies is not."""

    decoder: Annotated[Positional[Path], arg(metavar="DECODER")]
    """folder that `ijepa visualize rcdm train` wrote"""
    out: Path = Path("pictures")
    """folder to write rcdm-encoder.png or rcdm-predictor.png into"""
    source: str | None = None
    """where the networks are now; default: where they were"""
    images: Path | None = None
    """folder of images to look at; default: as for the other pictures"""
    count: int = 6
    """images, a row each"""
    samples: int = 6
    """of each, by different noise"""
    steps: int = 100
    """of the 1000, evenly spaced"""
    score: int = 0
    """make one sample of so many held-out images more, and say how often linear classifiers that
    were fitted on real images recognise their class"""
    num_heads: int | None = None
    """of a released checkpoint of a width that no ViT has"""
    seed: int = 0
    """of images and noise"""
    device: Device = "auto"
