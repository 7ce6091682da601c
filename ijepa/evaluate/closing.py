"""The table a run ends with: the target encoder beside an untrained one and raw pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ijepa.evaluate.features import encoder_features, pixel_features
from ijepa.evaluate.knn import knn_accuracy
from ijepa.evaluate.linear import linear_probe_accuracy
from ijepa.model import IJEPA


@dataclass(frozen=True)
class LabelledImages:
    """Images for a probe: some to fit it on, others to test it.

    Attributes:
        task: name of the labels.
        train_images, test_images: (n, C, Hi, Wi) and (m, C, Hi, Wi) uint8.
        train_labels, test_labels: (n,) and (m,) int64.
    """

    task: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def chance(self) -> float:
        """Accuracy of always guessing the most frequent class of the test images."""
        return self.test_labels.bincount().max().item() / self.test_labels.shape[0]


@dataclass(frozen=True)
class ProbeRow:
    """One line of the table; accuracies in [0, 1].

    Attributes:
        features: what was probed.
        linear, knn: accuracy of the linear probe and of the nearest neighbours.
    """

    features: str
    linear: float
    knn: float


def closing_table(
    trained: IJEPA, untrained: IJEPA | None, images: LabelledImages
) -> list[ProbeRow]:
    """Both probes on both kinds of target-encoder features, and on the baselines.

    Args:
        untrained: the same networks as initialised; None leaves the baselines out.
    """
    networks: Mapping[str, IJEPA] = {"pretrained": trained}
    if untrained is not None:
        networks = {**networks, "random network": untrained}
    rows = []
    for name, model in networks.items():
        train = encoder_features(model.target_encoder, images.train_images)
        test = encoder_features(model.target_encoder, images.test_images)
        for kind, title in (("last", "last block"), ("last4", "last 4 blocks")):
            rows.append(
                _probe(f"{name}, {title}", getattr(train, kind), getattr(test, kind), images)
            )
    if untrained is not None:
        config = trained.config
        train_pixels, test_pixels = (
            pixel_features(part, config.image_mean, config.image_std)
            for part in (images.train_images, images.test_images)
        )
        rows.append(_probe("raw pixels", train_pixels, test_pixels, images))
    return rows


def _probe(name: str, train: Tensor, test: Tensor, images: LabelledImages) -> ProbeRow:
    labelled = (train, images.train_labels, test, images.test_labels)
    return ProbeRow(name, linear_probe_accuracy(*labelled), knn_accuracy(*labelled))
