"""The table a run ends with: the target encoder beside an untrained one and raw pixels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ijepa.evaluate.features import pixel_features
from ijepa.evaluate.images import LabelledImages
from ijepa.evaluate.knn import knn_accuracy
from ijepa.evaluate.linear import linear_probe_accuracy
from ijepa.evaluate.pooling import pooled_features
from ijepa.evaluate.whitening import whiten
from ijepa.model import IJEPA


@dataclass(frozen=True)
class ProbeScores:
    """Accuracies in [0, 1] of the linear probe and of the nearest neighbours, among features as
    they are and whitened."""

    linear: float
    knn: float
    whitened_knn: float


@dataclass(frozen=True)
class ProbeRow:
    """One line of the table: what was probed, and the scores for each task; none where features
    are not finite."""

    features: str
    scores: dict[str, ProbeScores]


def closing_table(trained: IJEPA, untrained: IJEPA, images: LabelledImages) -> list[ProbeRow]:
    """The probes on every pooling of the target encoder's features, and on the baselines.

    Args:
        untrained: the same networks as initialised.
    """
    rows = []
    for name, model in (("pretrained", trained), ("random network", untrained)):
        train = pooled_features(model.target_encoder, images.train_images)
        test = pooled_features(model.target_encoder, images.test_images)
        rows += [_probe(f"{name}, {kind}", train[kind], test[kind], images) for kind in train]
    mean, std = trained.config.image_mean, trained.config.image_std
    train_pixels = pixel_features(images.train_images, mean, std)
    test_pixels = pixel_features(images.test_images, mean, std)
    rows.append(_probe("raw pixels", train_pixels, test_pixels, images))
    return rows


def _probe(name: str, train: Tensor, test: Tensor, images: LabelledImages) -> ProbeRow:
    scores: dict[str, ProbeScores] = {}
    if not (train.isfinite().all() and test.isfinite().all()):
        return ProbeRow(name, scores)
    white_train, white_test = whiten(train, test)
    for task, train_labels in images.train_labels.items():
        test_labels = images.test_labels[task]
        scores[task] = ProbeScores(
            linear=linear_probe_accuracy(train, train_labels, test, test_labels),
            knn=knn_accuracy(train, train_labels, test, test_labels),
            whitened_knn=knn_accuracy(white_train, train_labels, white_test, test_labels),
        )
    return ProbeRow(name, scores)
