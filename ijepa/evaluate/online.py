"""Probes on a fixed labelled subset while a run goes on: how far is it?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ijepa.evaluate.guessing import commonest_class_accuracy
from ijepa.evaluate.knn import knn_accuracy
from ijepa.evaluate.linear import linear_probe_accuracy

_PENALTY = 1e-4  # one, so that every look costs the same; between what few and many images want


@dataclass(frozen=True)
class OnlineScores:
    """Accuracies in [0, 1] on a quarter of the subset, of probes fitted on the rest."""

    linear: float
    knn: float
    guessing: float


def online_scores(features: Tensor, labels: Mapping[str, Tensor]) -> dict[str, OnlineScores]:
    """Task -> scores of (n, D) features with labels (n,) of each task; none where not finite.

    Raises:
        ValueError: fewer than eight images.
    """
    count = features.shape[0]
    if count < 8:
        raise ValueError(f"online probes need at least 8 labelled images, got {count}")
    if not features.isfinite().all():
        return {}
    tested = count // 4
    scores = {}
    for task, values in labels.items():
        split = (features[tested:], values[tested:], features[:tested], values[:tested])
        scores[task] = OnlineScores(
            linear=linear_probe_accuracy(*split, penalties=(_PENALTY,)),
            knn=knn_accuracy(*split),
            guessing=commonest_class_accuracy(values[tested:], values[:tested]),
        )
    return scores


def online_line(done: int, scores: Mapping[str, OnlineScores]) -> str:
    """The scores of every task in one line."""
    parts = [
        f"{task}: linear {100 * s.linear:.1f} %, kNN {100 * s.knn:.1f} % "
        f"(guessing {100 * s.guessing:.1f} %)"
        for task, s in scores.items()
    ]
    return f"step {done}: online probes of {'; '.join(parts)}"
