"""Every setting of a run: frozen dataclasses, one a topic, gathered in a `Recipe`.

Knows nobody else. A recipe is a TOML file whose tables are the fields of `Recipe`; the command
line overrides single values (`--train.batch-size 64`). Each class checks its own values when it
is made, so that a bad one is refused before any data is touched. Reading the files is
`ijepa.recipes`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal


def _known(steps: int | None, name: str) -> int:
    if steps is None:
        raise ValueError(f"{name} is not known yet: take `Recipe.in_steps(number of images)`")
    return steps


def _require(condition: bool, message: str) -> None:
    """Raise ValueError(message) where a setting is out of its range."""
    if not condition:
        raise ValueError(message)


def _require_positive(config, *names: str) -> None:
    """Every named field (or every entry of it) must be finite and greater than 0."""
    for name in names:
        value = getattr(config, name)
        entries = value if isinstance(value, tuple) else (value,)
        _require(
            all(0 < entry < math.inf for entry in entries),
            f"{name} must be greater than 0, got {value}",
        )


def _require_range(config, name: str, lowest: float, highest: float) -> None:
    """A (low, high) field must satisfy lowest < low <= high <= highest."""
    low, high = getattr(config, name)
    _require(
        lowest < low <= high <= highest,
        f"{name} must be (low, high) with {lowest} < low <= high <= {highest}, got ({low}, {high})",
    )


MAX_HEAD_DIM = 128  # of masked_vit_kernels, which is not imported to refuse a setting
_LARGEST_SIZE = 2**16  # of images and networks
_LONGEST = 1e9  # steps; epochs of a small set may be as many
_LARGEST_RATE = 10.0  # Adam moves every weight by about the learning rate: more is a slip


def _require_within(config, low: float, high: float, *names: str, why: str = "") -> None:
    """Every named field (or every entry of it) must lie in [low, high]; None passes."""
    for name in names:
        value = getattr(config, name)
        entries = value if isinstance(value, tuple) else (value,)
        _require(
            all(entry is None or low <= entry <= high for entry in entries),
            f"{name} must lie in [{low:g}, {high:g}]{why}, got {value}",
        )


# Encoder sizes by the field's usual names (G: paper appendix A.1); `ModelConfig(**VIT_SIZES["B"])`.
VIT_SIZES: dict[str, dict] = {
    "T": {"width": 192, "depth": 12, "heads": 3, "mlp_ratio": 4.0},
    "S": {"width": 384, "depth": 12, "heads": 6, "mlp_ratio": 4.0},
    "B": {"width": 768, "depth": 12, "heads": 12, "mlp_ratio": 4.0},
    "L": {"width": 1024, "depth": 24, "heads": 16, "mlp_ratio": 4.0},
    "H": {"width": 1280, "depth": 32, "heads": 16, "mlp_ratio": 4.0},
    "G": {"width": 1408, "depth": 40, "heads": 16, "mlp_ratio": 48 / 11},
}


@dataclass(frozen=True)
class ModelConfig:
    """The networks (paper appendix A.1).

    Attributes:
        image_size: (height, width) in pixels.
        channels: image channels.
        patch_size: (height, width) of a patch in pixels.
        width: features of a token in the encoders, a multiple of 4 (positions) and of `heads`.
        depth: blocks of the encoders.
        heads: attention heads of the encoders, each of a multiple of 8 features up to 128.
        mlp_ratio: width of the hidden layer of a block's MLP over its width.
        predictor_width: features of a token in the predictor.
        predictor_depth: blocks of the predictor.
        predictor_heads: attention heads of the predictor.
        loss: "smooth_l1" (released code) or "l2" (paper).
        target: "representation" or "pixels" (Table 7).
        target_masking: mask the target encoder's "output" or its "input" (Table 11).
        target_norm: what makes targets comparable: "layer", LayerNorm of each patch's features (the
            released code); "instance", each feature of an image standardised over its patches,
            which takes away what all of its patches share; "none".
        init: std of the weights of blocks and predictor: "released", .02 whatever the width; or
            "fan_in", 1 / sqrt(inputs), with which narrow networks learn as wide ones do (.02 suits
            width 2500, and at width 96 leaves the blocks a fifth as strong).
        patch_init_std: std of the patch embedding's initial weights.
        rescale_init: divide attention and MLP output weights by sqrt(2 * layer) at initialisation.
        activation_checkpointing: recompute each block in the backward pass.
        prune_predictor: the predictor's last block computes target rows only (exact).
        prune_target: the target encoder's last block computes target rows only (exact); without
            effect where `target_norm` "instance" needs every patch.
        share_predictor: the predictor's first block computes queries, keys and values of a context
            row once for all target blocks, and of mask tokens once a position (exact; saves 0.2 to
            1 % of a step's operations for wider gathers, and was not measured to be faster).
        residual: dtype of the residual stream in the bf16 modes of `train.precision`; LayerNorm
            statistics are float32 either way.
        image_mean: subtracted from each channel of pixels in [0, 1]; in [0, 1] itself.
        image_std: divides each channel; in [0.001, 1].
    """

    image_size: tuple[int, int] = (224, 224)
    channels: int = 3
    patch_size: tuple[int, int] = (16, 16)
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    predictor_width: int = 384
    predictor_depth: int = 6
    predictor_heads: int = 12
    loss: Literal["smooth_l1", "l2"] = "smooth_l1"
    target: Literal["representation", "pixels"] = "representation"
    target_masking: Literal["output", "input"] = "output"
    target_norm: Literal["layer", "instance", "none"] = "layer"
    init: Literal["released", "fan_in"] = "released"
    patch_init_std: float = 0.02
    rescale_init: bool = False
    activation_checkpointing: bool = False
    prune_predictor: bool = True
    prune_target: bool = True
    share_predictor: bool = False
    residual: Literal["fp32", "bf16"] = "fp32"
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self):
        _require_positive(self, "image_size", "channels", "patch_size", "depth", "mlp_ratio")
        _require_positive(self, "predictor_depth", "patch_init_std")
        _require_within(self, 1, _LARGEST_SIZE, "image_size", "channels", "patch_size")
        _require_within(self, 1, _LARGEST_SIZE, "width", "depth", "heads")
        _require_within(self, 1, _LARGEST_SIZE, "predictor_width", "predictor_depth")
        _require_within(self, 1, _LARGEST_SIZE, "predictor_heads")
        _require_within(self, 0.0, 100.0, "mlp_ratio")
        for width in (self.width, self.predictor_width):
            _require(
                round(width * self.mlp_ratio) >= 1,
                f"mlp_ratio {self.mlp_ratio} of width {width} leaves a hidden layer of none",
            )
        pixels = ", of pixels in [0, 1]"
        _require_within(self, 0.0, 1.0, "image_mean", why=pixels)
        _require_within(self, 1e-3, 1.0, "image_std", why=pixels)
        _require_within(self, 0.0, 10.0, "patch_init_std")
        for size, patch in zip(self.image_size, self.patch_size, strict=True):
            _require(
                size % patch == 0,
                f"image_size must be a multiple of patch_size: for {size} and patches of {patch} "
                f"the nearest is {max(round(size / patch), 1) * patch}",
            )
        for width_name, heads_name in (("width", "heads"), ("predictor_width", "predictor_heads")):
            _require_positive(self, width_name, heads_name)
            width, heads = getattr(self, width_name), getattr(self, heads_name)
            _require(width % 4 == 0, f"{width_name} must be a multiple of 4, got {width}")
            _require(
                width % heads == 0,
                f"{width_name} {width} must be a multiple of {heads_name} {heads}",
            )
            _require(
                width // heads % 8 == 0 and width // heads <= MAX_HEAD_DIM,
                f"{width_name} {width} over {heads_name} {heads} must be a multiple of 8 up to "
                f"{MAX_HEAD_DIM}, got {width // heads}",
            )
        _require(
            self.target_norm != "instance" or self.target_masking == "output",
            'target_norm "instance" needs every patch of an image, which target_masking "input" '
            'hides: choose target_norm "layer", or target_masking "output"',
        )
        for name in ("image_mean", "image_std"):
            entries = len(getattr(self, name))
            _require(
                entries == self.channels,
                f"{name} must have {self.channels} entries, one a channel, got {entries}",
            )

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return (
            self.image_size[0] // self.patch_size[0],
            self.image_size[1] // self.patch_size[1],
        )

    @property
    def num_patches(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]

    @property
    def prunes_target(self) -> bool:
        """Whether the target encoder's last block computes target rows only."""
        return self.prune_target and self.target_norm != "instance"

    @property
    def target_width(self) -> int:
        """Width of what is predicted: the encoder's, or a patch's pixels."""
        if self.target == "pixels":
            return self.channels * self.patch_size[0] * self.patch_size[1]
        return self.width


@dataclass(frozen=True)
class MaskConfig:
    """How context and targets are drawn (paper section 3, Tables 6 and 8 to 10).

    Attributes:
        strategy: "multiblock", "rasterized", "block" or "random".
        batching: "packed" (every image keeps its own sizes) or "truncate" (released behaviour).
        context_scale: range of the context block's share of the grid.
        target_scale: range of a target block's share of the grid.
        target_aspect: range of a target block's height over width.
        num_targets: M, blocks an image.
        target_share: the target's share of the grid for "block" and "random" (M = 1).
        min_context: fewest context patches of an image; None chooses by the grid.
    """

    strategy: Literal["multiblock", "rasterized", "block", "random"] = "multiblock"
    batching: Literal["packed", "truncate"] = "packed"
    context_scale: tuple[float, float] = (0.85, 1.0)
    target_scale: tuple[float, float] = (0.15, 0.2)
    target_aspect: tuple[float, float] = (0.75, 1.5)
    num_targets: int = 4
    target_share: float = 0.6
    min_context: int | None = None

    def __post_init__(self):
        _require_range(self, "context_scale", 0.0, 1.0)
        _require_range(self, "target_scale", 0.0, 1.0)
        _require_range(self, "target_aspect", 0.0, math.inf)
        _require_positive(self, "num_targets")
        _require_within(self, 1, _LARGEST_SIZE, "num_targets", "min_context")
        _require(
            0 < self.target_share < 1, f"target_share must lie in (0, 1), got {self.target_share}"
        )
        _require(
            self.min_context is None or self.min_context >= 1,
            f"min_context must be at least 1, got {self.min_context}",
        )


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they are cropped.

    Attributes:
        source: "shapes", "scenes" or "folder".
        path: the folder of images, for "folder".
        num_images: images to render, for the procedural sources.
        num_held_out: further images for the closing probes, never trained on; of a labelled folder
            this many are kept from the probes' fit (pretraining sees them, without labels).
        crop_scale: area range of RandomResizedCrop; (1, 1) takes the whole image.
        flip: mirror half of the images.
        interpolation: "bilinear" (released pretraining) or "bicubic".
        workers: loader processes; 0 loads in the main one.
    """

    source: Literal["shapes", "scenes", "folder"] = "shapes"
    path: str | None = None
    num_images: int = 12_000
    num_held_out: int = 2_000
    crop_scale: tuple[float, float] = (0.3, 1.0)
    flip: bool = False
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    workers: int = 1

    def __post_init__(self):
        _require_positive(self, "num_images", "num_held_out")
        _require_within(self, 1, _LONGEST, "num_images", "num_held_out")
        _require_within(self, 0, 1024, "workers")
        _require_range(self, "crop_scale", 0.0, 1.0)
        _require(self.workers >= 0, f"workers must not be negative, got {self.workers}")
        _require(self.path is None or self.path.strip() != "", "path must name a folder")
        _require(
            self.path is None or self.source == "folder",
            f'path = {self.path!r} needs data.source = "folder"',
        )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with the released parameter groups (paper appendix A.1).

    Attributes:
        betas: decay of Adam's averages of the gradient and of its square, each step.
        eps: added to the root of the average square that Adam divides by.
        max_grad_norm: clip the global gradient norm to this; None leaves it alone.
        max_skipped_steps: stop after this many non-finite steps in a row.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float | None = None
    max_skipped_steps: int = 20

    def __post_init__(self):
        _require(
            all(0 <= beta < 1 for beta in self.betas), f"betas must lie in [0, 1), got {self.betas}"
        )
        _require_positive(self, "eps", "max_skipped_steps")
        _require_within(self, 1e-30, 1.0, "eps", why=", of float32 that is not rounded to 0")
        _require_within(self, 1, _LONGEST, "max_skipped_steps")
        if self.max_grad_norm is not None:
            _require_positive(self, "max_grad_norm")


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate, weight decay and momentum as functions of the step.

    Lengths count steps. A recipe may leave them to the run: `Recipe.in_steps` fills
    `total_steps` in, and turns `warmup_epochs` into `warmup_steps`, when the data is known.

    Attributes:
        total_steps: length the schedules are laid out for; None: `stretch` times the run's steps.
        stretch: the released code's `ipe_scale`; a run ends before its schedules do where it is
            over 1 (default of the released code 1.25, its published recipes set 1).
        warmup_steps: steps of linear warm-up from start_lr to peak_lr.
        warmup_epochs: the warm-up in passes over the data, in place of `warmup_steps`.
        start_lr: learning rate of step 0.
        peak_lr: learning rate after the warm-up; a cosine leads from there to final_lr.
        final_lr: learning rate of the last step.
        weight_decay: of step 0.
        final_weight_decay: of the last step.
        weight_decay_shape: "cosine" (released code) or "linear" (paper).
        momentum: of the target encoder at step 0, linear in the step.
        final_momentum: of the target encoder at the last step.
    """

    total_steps: int | None = None
    stretch: float = 1.0
    warmup_steps: int = 0
    warmup_epochs: float | None = None
    start_lr: float = 2e-4
    peak_lr: float = 1e-3
    final_lr: float = 1e-6
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    weight_decay_shape: Literal["cosine", "linear"] = "cosine"
    momentum: float = 0.996
    final_momentum: float = 1.0

    @property
    def num_steps(self) -> int:
        """`total_steps`, of a schedule whose lengths are in steps."""
        return _known(self.total_steps, "schedule.total_steps")

    def __post_init__(self):
        if self.total_steps is not None:
            _require_positive(self, "total_steps")
        _require(self.stretch >= 1, f"stretch must be at least 1, got {self.stretch}")
        _require(
            not (self.warmup_steps and self.warmup_epochs is not None),
            f"give warmup_steps or warmup_epochs, not both: got {self.warmup_steps} steps and "
            f"{self.warmup_epochs} epochs",
        )
        _require_within(self, 1, 1000, "stretch")
        _require_within(self, 0, _LONGEST, "total_steps", "warmup_steps", "warmup_epochs")
        _require_within(self, 0.0, _LARGEST_RATE, "start_lr", "peak_lr", "final_lr")
        _require_within(self, 0.0, _LARGEST_RATE, "weight_decay", "final_weight_decay")
        for name in ("momentum", "final_momentum"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"{name} must lie in [0, 1], got {value}")


@dataclass(frozen=True)
class TrainConfig:
    """The run.

    Attributes:
        steps: optimiser steps to take.
        epochs: passes over the data to make, in place of `steps`.
        batch_size: images a step, over all ranks and micro-batches.
        accumulate: micro-batches a step, on each rank.
        precision: "fp32", "bf16" (autocast) or "bf16-params" (bfloat16 weights beside float32
            masters that the optimiser keeps and checkpoints write).
        target_precision: "same" as `precision`, or "fp8": the target encoder's products run in
            float8, each token and each row of weights with its own scale, in the training step
            alone; beside a bf16 `precision`. Twice the rate on Hopper, Ada and Blackwell; CPUs
            compute the same numbers more slowly. Checkpoints are the same either way.
        compile: trace and fuse everything between the kernels with torch.compile; "auto" does on a
            GPU. The first step of each capacity then takes a minute or so. "blocks" traces one
            transformer block for all of a network, which takes seconds.
        cuda_graph: replay a step as one CUDA graph; a single GPU without accumulation only.
        parallel: what several ranks do (torchrun), nothing in a single process: "ddp" holds
            everything on each and sums gradients while the backward pass runs; "fsdp" holds shards
            of weights, gradients and optimiser; "hsdp" shards within a machine and replicates over
            machines. "auto" is ddp where its state leaves half of a GPU's memory, else shards.
        seed: of initialisation, data order, crops and masks.
        device: "auto", "cpu" or "cuda".
        output: folder of the run; None makes runs/<recipe>-<number>.
        checkpoint_every: steps between checkpoints.
        log_every: steps between lines of metrics.jsonl.
        tensorboard: also write TensorBoard event files.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 64
    accumulate: int = 1
    precision: Literal["fp32", "bf16", "bf16-params"] = "fp32"
    target_precision: Literal["same", "fp8"] = "same"
    compile: Literal["auto", "on", "blocks", "off"] = "auto"
    cuda_graph: bool = False
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    output: str | None = None
    checkpoint_every: int = 500
    log_every: int = 10
    tensorboard: bool = False

    @property
    def num_steps(self) -> int:
        """`steps`, of a recipe whose lengths are in steps."""
        return _known(self.steps, "train.steps")

    def __post_init__(self):
        _require(
            self.steps is None or self.epochs is None,
            f"give steps or epochs, not both: got {self.steps} steps and {self.epochs} epochs",
        )
        for name in ("steps", "epochs"):
            if getattr(self, name) is not None:
                _require_positive(self, name)
        _require_positive(self, "batch_size", "accumulate", "checkpoint_every", "log_every")
        _require_within(self, 0, _LONGEST, "steps", "epochs", "batch_size", "accumulate")
        _require_within(self, 1, _LONGEST, "checkpoint_every", "log_every")
        _require(
            self.batch_size % self.accumulate == 0,
            f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}",
        )
        _require(
            self.target_precision == "same" or self.precision != "fp32",
            'target_precision = "fp8" goes with precision = "bf16" or "bf16-params", got "fp32"',
        )
        _require(0 <= self.seed < 2**63, f"seed must lie in [0, 2**63), got {self.seed}")
        _require(
            self.output is None or self.output.strip() != "",
            "output must name a folder; leave it out for runs/<recipe>-<number>",
        )


@dataclass(frozen=True)
class MonitorConfig:
    """The collapse panel and the closing evaluation.

    Attributes:
        every: steps between panels; 0 turns them off.
        images: images a panel looks at.
        online_images: labelled training images that online probes look at beside it, three quarters
            to fit and the rest to test; 0 turns them off. checkpoints/best is chosen by them.
        evaluate: end the run with probes beside a random network and raw pixels (needs labels).
        probe_images: training images that the probes are fitted on, at most.
    """

    every: int = 250
    images: int = 512
    online_images: int = 1000
    evaluate: bool = True
    probe_images: int = 10_000

    def __post_init__(self):
        _require(self.every >= 0, f"every must not be negative, got {self.every}")
        _require_within(self, 0, _LONGEST, "every", "images", "online_images", "probe_images")
        for name in ("images", "probe_images"):
            value = getattr(self, name)
            _require(value >= 2, f"{name} must be at least 2, got {value}")


@dataclass(frozen=True)
class Recipe:
    """All settings of a run; one TOML table a field.

    Attributes:
        name: what the run's folder is called after; the recipe file's name by default.
    """

    name: str = "run"
    model: ModelConfig = field(default_factory=ModelConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self):
        _require(
            0 < len(self.name) <= 100
            and self.name.isprintable()
            and not set(self.name) & set("/\\")
            and self.name.strip(". ") != "",
            "name must be one that a folder can have, without / or \\, of at most 100 characters, "
            f"got {self.name!r}",
        )

    def check_length(self) -> None:
        """Raise ValueError unless the recipe says how long it trains."""
        _require(
            self.train.steps is not None or self.train.epochs is not None,
            "the length of the run is not set: give train.steps or train.epochs",
        )

    def micro_batch_size(self, ranks: int) -> int:
        """Images that one of so many ranks takes at once.

        Raises:
            ValueError: the batch cannot be shared evenly.
        """
        batch, accumulate = self.train.batch_size, self.train.accumulate
        parts = accumulate * ranks
        _require(
            batch % parts == 0,
            f"train.batch_size {batch} cannot be shared among {ranks} ranks x {accumulate} "
            f"micro-batches: the nearest that can is {max(round(batch / parts), 1) * parts}",
        )
        return batch // parts

    def _too_few_images(self, num_images: int) -> str:
        accumulate = self.train.accumulate
        largest = num_images // accumulate * accumulate
        fits = f"--train.batch-size {largest} or less"
        if largest == 0:
            fits = f"--train.batch-size {num_images} or less with --train.accumulate 1"
        return (
            f"train.batch_size {self.train.batch_size} exceeds the {num_images} images of the data"
            f": give {fits}, or take a recipe for little data such as shapes-tiny"
        )

    def in_steps(self, num_images: int) -> Recipe:
        """The same recipe with every length in optimiser steps, for a data set of this size.

        An epoch is `num_images // batch_size` steps, as in the released code, whose loader drops
        the last incomplete batch.

        Raises:
            ValueError: no length is given, or a batch does not fit the data.
        """
        self.check_length()
        steps_per_epoch = num_images // self.train.batch_size
        _require(steps_per_epoch > 0, self._too_few_images(num_images))
        steps = self.train.steps
        if steps is None:
            assert self.train.epochs is not None  # check_length
            steps = max(round(self.train.epochs * steps_per_epoch), 1)
        schedule = self.schedule
        warmup_steps = schedule.warmup_steps
        if schedule.warmup_epochs is not None:
            warmup_steps = round(schedule.warmup_epochs * steps_per_epoch)
        total_steps = schedule.total_steps or int(schedule.stretch * steps)
        return dataclasses.replace(
            self,
            train=dataclasses.replace(self.train, steps=steps, epochs=None),
            schedule=dataclasses.replace(
                schedule,
                total_steps=total_steps,
                warmup_steps=min(warmup_steps, total_steps),
                warmup_epochs=None,
            ),
        )
