"""Labelled images that probes are fitted on and tested with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ijepa.evaluate.guessing import commonest_class_accuracy


class ProbesNotFitted(ValueError):
    """There is too little to fit probes on or to test them with; the message says what."""


@dataclass(frozen=True)
class LabelledImages:
    """Images for probes: some to fit them on, others to test them.

    Attributes:
        train_images, test_images: (n, C, Hi, Wi) and (m, C, Hi, Wi) uint8.
        train_labels, test_labels: task -> (n,) and task -> (m,) int64.

    Raises:
        ProbesNotFitted: fewer than two images to fit on, or none to test with.
    """

    train_images: Tensor
    train_labels: Mapping[str, Tensor]
    test_images: Tensor
    test_labels: Mapping[str, Tensor]

    def __post_init__(self):
        fitted, tested = self.train_images.shape[0], self.test_images.shape[0]
        if fitted < 2 or tested < 1:
            raise ProbesNotFitted(
                f"probes need two labelled images to fit on and one to test with, "
                f"there are {fitted} and {tested}"
            )

    @property
    def chance(self) -> dict[str, float]:
        """Task -> accuracy on the test images of guessing the commonest class of the others."""
        return {
            task: commonest_class_accuracy(labels, self.test_labels[task])
            for task, labels in self.train_labels.items()
        }
