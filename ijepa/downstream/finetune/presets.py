"""Settings of fine-tuning: the paper's for 1 % of ImageNet and for all of it, and small ones.

Where the paper is silent they are MAE's, whose protocol it adapts: a cosine after a linear warm-up,
set every iteration, and a smallest learning rate of 1e-6.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class FinetuneSettings:
    """How a classifier is trained.

    Attributes:
        epochs, step_images: length, and images a step.
        lr: peak learning rate of the head, for so many images a step.
        warmup_epochs, min_lr: linear from 0 to `lr`, then a cosine to `min_lr`.
        weight_decay: AdamW's; not of biases and norms.
        layer_decay: a block's learning rate over the next one's.
        drop_path: chance that the last block is skipped, rising linearly from 0.
        mixup, cutmix: alpha of each one's beta distribution, 0 for none; where both are on, each
            batch takes one of them, by even chances.
        smoothing: of the labels.
        rand_augment: "rand-m9-mstd0.5-inc1" or "none".
    """

    epochs: int
    step_images: int
    lr: float
    weight_decay: float
    warmup_epochs: float = 5.0
    min_lr: float = 1e-6
    layer_decay: float = 0.75
    drop_path: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.1
    rand_augment: str = "none"

    def __post_init__(self):
        for name, low, high in (
            ("epochs", 1, 1e6), ("step_images", 1, 1e6), ("lr", 0, 10), ("weight_decay", 0, 10),
            ("warmup_epochs", 0, 1e6), ("min_lr", 0, 10), ("mixup", 0, 100), ("cutmix", 0, 100),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {value}")
        for name in ("drop_path", "smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must lie in (0, 1], got {self.layer_decay}")

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Of the head, at a step from 0."""
        epoch = step / steps_per_epoch
        if epoch < self.warmup_epochs:
            return self.lr * epoch / self.warmup_epochs
        rest = max(self.epochs - self.warmup_epochs, 1e-9)
        cosine = 0.5 * (1 + math.cos(math.pi * min((epoch - self.warmup_epochs) / rest, 1.0)))
        return self.min_lr + (self.lr - self.min_lr) * cosine

    def changed(self, **values: object) -> FinetuneSettings:
        """With those values that are not None; where the images a step are others and no learning
        rate is given, it moves along in proportion."""
        given = {name: value for name, value in values.items() if value is not None}
        if "step_images" in given and "lr" not in given:
            given["lr"] = self.lr * int(given["step_images"]) / self.step_images  # type: ignore[call-overload]
        return dataclasses.replace(self, **given)  # type: ignore[arg-type]


_RAND = "rand-m9-mstd0.5-inc1"
PRESETS = {
    # Paper A.2, ViT-L/16; with -huge H/14 and H/16 at 448.
    "lowshot": FinetuneSettings(50, 512, 3e-5, 5e-2, rand_augment=_RAND),
    "lowshot-huge": FinetuneSettings(50, 512, 3e-5, 4e-1, rand_augment=_RAND),
    # Paper D; base learning rate 1e-4 for 256 images.
    "full": FinetuneSettings(
        50, 528, 1e-4 * 528 / 256, 0.04, drop_path=0.25, mixup=0.8, cutmix=1.0, rand_augment=_RAND
    ),
    # Ours, for small networks and images: they need larger steps and stand less augmentation.
    "small": FinetuneSettings(50, 64, 1e-3, 0.05, drop_path=0.1),
}
