"""Every setting of a run: frozen dataclasses, one a topic, gathered in a `Recipe`.

Knows nobody else. A recipe is a TOML file whose tables are the fields of `Recipe`; the command
line overrides single values (`--train.batch-size 64`). Each class checks its own values when it
is made, so that a bad one is refused before any data is touched.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelConfig:
    """The networks (paper appendix A.1).

    Attributes:
        image_size: (height, width) in pixels.
        channels: image channels.
        patch_size: (height, width) of a patch in pixels.
        width, depth, heads, mlp_ratio: the encoders.
        predictor_width, predictor_depth, predictor_heads: the predictor.
        loss: "smooth_l1" (released code) or "l2" (paper).
        target: "representation" or "pixels" (Table 7).
        target_masking: mask the target encoder's "output" or its "input" (Table 11).
        patch_init_std: std of the patch embedding's initial weights.
        rescale_init: divide attention and MLP output weights by sqrt(2 * layer) at initialisation.
        activation_checkpointing: recompute each block in the backward pass.
        image_mean, image_std: per-channel normalisation of pixels in [0, 1].
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
    loss: str = "smooth_l1"
    target: str = "representation"
    target_masking: str = "output"
    patch_init_std: float = 0.02
    rescale_init: bool = False
    activation_checkpointing: bool = False
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)

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


@dataclass(frozen=True)
class MaskConfig:
    """How context and targets are drawn (paper section 3, Tables 6 and 8 to 10).

    Attributes:
        strategy: "multiblock", "rasterized", "block" or "random".
        batching: "packed" (every image keeps its own sizes) or "truncate" (released behaviour).
        context_scale, target_scale: ranges of a block's share of the grid.
        target_aspect: range of a target block's height over width.
        num_targets: M, blocks an image.
        min_context: fewest context patches of an image; None chooses by the grid.
    """

    strategy: str = "multiblock"
    batching: str = "packed"
    context_scale: tuple[float, float] = (0.85, 1.0)
    target_scale: tuple[float, float] = (0.15, 0.2)
    target_aspect: tuple[float, float] = (0.75, 1.5)
    num_targets: int = 4
    min_context: int | None = None


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they are cropped.

    Attributes:
        source: "shapes", "scenes" or "folder".
        path: the folder of images, for "folder".
        num_images: images to render, for the procedural sources.
        crop_scale: area range of RandomResizedCrop; (1, 1) takes the whole image.
        flip: mirror half of the images.
        interpolation: "bilinear" (released pretraining) or "bicubic".
        workers: loader processes; 0 loads in the main one.
    """

    source: str = "shapes"
    path: str | None = None
    num_images: int = 12_000
    crop_scale: tuple[float, float] = (0.3, 1.0)
    flip: bool = False
    interpolation: str = "bilinear"
    workers: int = 1


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with the released parameter groups (paper appendix A.1).

    Attributes:
        betas, eps: Adam's.
        max_grad_norm: clip the global gradient norm to this; None leaves it alone.
        max_skipped_steps: stop after this many non-finite steps in a row.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float | None = None
    max_skipped_steps: int = 20


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate, weight decay and momentum as functions of the step (all counts in steps).

    Attributes:
        total_steps: length the schedules are laid out for (released: 1.25 x the epochs run).
        warmup_steps, start_lr, peak_lr, final_lr: linear warm-up, then cosine.
        weight_decay, final_weight_decay, weight_decay_shape: "cosine" (released), "linear" (paper).
        momentum, final_momentum: of the target encoder, linear in the step.
    """

    total_steps: int = 1000
    warmup_steps: int = 100
    start_lr: float = 2e-4
    peak_lr: float = 1e-3
    final_lr: float = 1e-6
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    weight_decay_shape: str = "cosine"
    momentum: float = 0.996
    final_momentum: float = 1.0


@dataclass(frozen=True)
class TrainConfig:
    """The run.

    Attributes:
        steps: optimiser steps to take.
        batch_size: images a step, over all ranks and micro-batches.
        accumulate: micro-batches a step.
        precision: "fp32" or "bf16" (autocast).
        seed: of initialisation, data order, crops and masks.
        device: "auto", "cpu" or "cuda".
        output: folder of the run; None makes runs/<recipe>-<number>.
        checkpoint_every: steps between checkpoints.
        log_every: steps between lines of metrics.jsonl.
        tensorboard: also write TensorBoard event files.
    """

    steps: int = 1000
    batch_size: int = 64
    accumulate: int = 1
    precision: str = "fp32"
    seed: int = 0
    device: str = "auto"
    output: str | None = None
    checkpoint_every: int = 500
    log_every: int = 10
    tensorboard: bool = False


@dataclass(frozen=True)
class MonitorConfig:
    """The collapse panel and the closing evaluation.

    Attributes:
        every: steps between panels; 0 turns them off.
        images: images a panel looks at.
        evaluate: end the run with probes beside a random network and raw pixels (needs labels).
    """

    every: int = 250
    images: int = 512
    evaluate: bool = True


@dataclass(frozen=True)
class Recipe:
    """All settings of a run; one TOML table a field."""

    model: ModelConfig = field(default_factory=ModelConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
