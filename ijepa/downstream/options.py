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
    """a run's folder, one of its checkpoints, a released .pth.tar, or what ijepa convert wrote"""
    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """of images, nested or not"""
    out: Path
    """folder to write into"""
    layers: Literal["last", "last4"] = "last"
    """the last block, or the last four concatenated"""
    encoder: Annotated[EncoderOptions, arg(name="")] = EncoderOptions()


@dataclass(frozen=True)
class ConvertOptions:
    """An encoder in the form of another program, float32; every tensor is accounted for.

    released      all three networks, a .pth.tar as the released code writes it
    timm          a state dict for timm's vit_* without a class token: .safetensors or .pth
    transformers  a folder for IJepaModel.from_pretrained and AutoImageProcessor.from_pretrained
    safetensors   one file that describes itself
    onnx          uint8 images of any batch to features, run by onnxruntime and others

    Each but onnx is a SOURCE again, of this command, of embed and of eval.
    """

    source: Source
    """a run's folder, one of its checkpoints, a released .pth.tar, or what this command wrote"""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """file or folder to write; there must be nothing"""
    to: Literal["released", "timm", "transformers", "safetensors", "onnx"]
    network: Literal["target_encoder", "context_encoder"] = "target_encoder"
    """the paper evaluates the target encoder; released has both"""
    num_heads: int | None = None
    """of a source of a width that no ViT has"""


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


@dataclass(frozen=True)
class EvalOptions:
    """What every evaluation takes."""

    source: Source
    """a run's folder, one of its checkpoints, a released .pth.tar, or what ijepa convert wrote"""
    data: str = "folder"
    """shapes, scenes-count, scenes-dist (rendered); folder, csv, cifar10, cifar100, clevr-count,
    clevr-dist, inat18, places205 (with --path); what is expected there is shown where it is not"""
    path: Path | None = None
    """of the data"""
    train_images: int | None = None
    """at most so many to fit on, of a fixed draw"""
    test_images: int | None = None
    """at most so many to test with"""
    random_network: bool = False
    """evaluate a network of the same sizes with random weights instead"""
    seed: int = 0
    """of what is drawn: order, views, initial heads, few labels, the random network"""
    out: Path | None = None
    """JSON file for the result, every figure with its settings"""
    encoder: Annotated[EncoderOptions, arg(name="")] = EncoderOptions()


@dataclass(frozen=True)
class KnnOptions(EvalOptions):
    """Weighted nearest neighbours on average-pooled features: of the last block, of the last four.

    Features are kept in $IJEPA_CACHE/features: a second evaluation of the same encoder on the same
    images starts at once.
    """

    neighbours: tuple[int, ...] = (10, 20, 100, 200)
    """how many vote, each with exp(cosine / temperature)"""
    temperature: float = 0.07


@dataclass(frozen=True)
class LinearOptions(EvalOptions):
    """Linear probes: {last block, last 4} x {BatchNorm, plain} x learning rate x weight decay.

    All heads are trained at once over one frozen pass; each is reported, and the best of them, as
    the paper does, with a confidence interval that knows nothing of that choice.
    """

    protocol: str = "cached"
    """cached: features computed once; imagenet, cifar100, places205, inat18, clevr-count,
    clevr-dist as in the paper, with -released as in the released configurations"""
    epochs: int | None = None
    """in place of the protocol's; its milestones move along"""
    step_images: int | None = None
    """images a step, in place of the protocol's; the learning rate moves along"""
    solver: Literal["grid", "lbfgs"] = "grid"
    """lbfgs: logistic regression to its optimum on cached features, as the closing table has it"""


@dataclass(frozen=True)
class LowshotOptions(EvalOptions):
    """Logistic regression on the features of few labelled images (needs scikit-learn).

    Fine-tuning on few labels: ijepa eval finetune --per-class N.
    """

    per_class: int | None = None
    """labels a class, drawn by the seed"""
    draws: int = 1
    """how many draws of them, by seeds from --seed on; their mean and spread are told"""
    list: Path | None = None
    """file names of the labelled images, one a line, as 1percent.txt of SimCLR"""


@dataclass(frozen=True)
class FinetuneOptions(EvalOptions):
    """Train encoder and head together on labelled images, and test the classifier.

    Stopped, or killed, it goes on with: ijepa eval finetune --resume FOLDER
    """

    preset: Literal["small", "lowshot", "lowshot-huge", "full"] = "full"
    """lowshot: the paper's for 1 % of ImageNet (A.2; -huge for H/14); full: for all of it (D);
    small: for small networks and images. What is given below wins over it"""
    output: Path | None = None
    """folder of the run; default: runs/finetune-TASK-NUMBER"""
    per_class: int | None = None
    """train on so many labels a class, drawn by the seed"""
    list: Path | None = None
    """train on the images that a list names, one file name a line"""
    view: Literal["random crop", "flipped crop", "flipped squash", "squash"] | None = None
    """of a training image; default: flipped squash of rendered images, else random crop"""
    epochs: int | None = None
    step_images: int | None = None
    """images a step; without --lr the learning rate moves along"""
    lr: float | None = None
    """of the head, at its peak"""
    min_lr: float | None = None
    warmup_epochs: float | None = None
    weight_decay: float | None = None
    layer_decay: float | None = None
    """a block's learning rate over the next one's; default of a random network: 1"""
    drop_path: float | None = None
    mixup: float | None = None
    cutmix: float | None = None
    smoothing: float | None = None
    rand_augment: Literal["none", "rand-m9-mstd0.5-inc1"] | None = None
    save_every: int = 500
    """steps between checkpoints"""


@dataclass(frozen=True)
class ResumeOptions:
    """Go on with a run of fine-tuning; everything but where it runs stays as it began."""

    resume: Path
    """folder of the run"""
    path: Path | None = None
    """where the data are now"""
    workers: int | None = None
    device: Literal["auto", "cpu", "cuda"] | None = None
