"""How the paper, and the released configurations where they differ, train linear probes.

See the paper's appendix A.2 for ImageNet and its Table 4 and appendix A.2 for the transfer tasks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ijepa.data.views import CenterCrop, Flipped, RandomResizedCrop, Squash, Transform
from ijepa.evaluate.pretrained import evaluation_crop

View = Literal["own", "crop", "flipped crop", "random crop", "squash", "flipped squash"]
_RANDOM_SCALE = (0.08, 1.0)  # of a supervised RandomResizedCrop


@dataclass(frozen=True)
class LinearProtocol:
    """One way to train a grid of heads.

    Attributes:
        optimizer: "lars", or "sgd" with Nesterov's momentum; momentum .9 in both.
        epochs, batch_size: of the training.
        lrs: base learning rates, for 256 images a step: what is used is lr * batch / 256.
        weight_decays: of the grid.
        milestones: epochs at which the learning rate becomes a tenth; empty for a cosine.
        final_share: of the learning rate that a cosine ends at.
        train_view, test_view: what images look like; "own" is the encoder's own view, with features
            computed once and kept on disk.
    """

    optimizer: Literal["lars", "sgd"]
    epochs: int
    batch_size: int
    lrs: tuple[float, ...]
    weight_decays: tuple[float, ...]
    milestones: tuple[int, ...] = ()
    final_share: float = 0.0
    train_view: View = "own"
    test_view: View = "own"

    def factor(self, done: int, steps_per_epoch: int) -> float:
        """Of the learning rate, after `done` steps."""
        if not self.milestones:
            progress = done / max(self.epochs * steps_per_epoch, 1)
            cosine = 0.5 * (1 + math.cos(math.pi * progress))
            return self.final_share + (1 - self.final_share) * cosine
        epoch = done // steps_per_epoch
        return 0.1 ** sum(epoch >= milestone for milestone in self.milestones)


def _imagenet(lrs: tuple[float, ...]) -> LinearProtocol:
    return LinearProtocol("lars", 50, 16_384, lrs, (5e-4, 0.0), (15, 30, 45),
                          train_view="random crop", test_view="crop")  # fmt: skip


def _transfer(epochs: int, milestones: tuple[int, ...], train: View, test: View) -> LinearProtocol:
    return LinearProtocol("sgd", epochs, 256, (0.01,), (5e-4,), milestones, 0.01, train, test)


# The paper's where there are two; with "-released" the released configuration's.
PROTOCOLS: dict[str, LinearProtocol] = {
    # Ours, for quick work: the views of `ijepa embed`, so that features are computed once.
    "cached": LinearProtocol("sgd", 50, 256, (0.01, 0.03, 0.1, 0.3), (5e-4, 0.0)),
    "imagenet": _imagenet((0.01, 0.05, 0.001)),
    "imagenet-released": _imagenet((0.1, 0.01)),
    "cifar100": _transfer(28, (8, 16, 24), "squash", "squash"),
    "cifar100-released": _transfer(28, (8, 16, 24), "random crop", "crop"),
    "places205": _transfer(14, (4, 8, 12), "random crop", "crop"),
    "inat18": _transfer(84, (24, 48, 72), "random crop", "crop"),
    "clevr-count": _transfer(50, (), "flipped crop", "crop"),
    "clevr-count-released": _transfer(50, (), "flipped squash", "squash"),
    "clevr-dist": _transfer(100, (), "flipped crop", "crop"),
    "clevr-dist-released": _transfer(100, (), "flipped squash", "squash"),
}


def view_transform(view: View, own: Transform, size: tuple[int, int]) -> Transform:
    """The transform of a protocol's view.

    Args:
        own: what the encoder looks at by itself.
        size: (height, width) of what it gets.
    """
    crop = evaluation_crop(size)
    views: dict[View, Transform] = {
        "own": own,
        "crop": crop,
        "flipped crop": Flipped(CenterCrop(size, crop.crop_ratio, "bicubic")),
        "random crop": RandomResizedCrop(size, _RANDOM_SCALE, interpolation="bicubic", flip=True),
        "squash": Squash(size, "bicubic"),
        "flipped squash": Flipped(Squash(size, "bicubic")),
    }
    return views[view]


def is_random(view: View) -> bool:
    """Whether an image looks different every time, so that its features cannot be kept."""
    return view.startswith(("flipped", "random"))
