"""The collapse panel: is the target encoder still telling images apart?

The loss of a joint-embedding method is only a proxy: it can fall because the targets have become
easy. The panel looks at average-pooled target features of a fixed set of images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa.evaluate.guessing import commonest_class_accuracy
from ijepa.evaluate.knn import knn_accuracy

_EPS = 1e-7  # of RankMe


@dataclass(frozen=True)
class Panel:
    """What the target features of some images look like; no figures where any is not finite.

    Attributes:
        effective_rank: RankMe, between 1 (all features on one line) and the width.
        centred_rank: the same of the features less their mean, which is most of them otherwise.
        feature_std: standard deviation over the images, mean over the dimensions.
        lowest_std: that of the most constant dimension.
        cosine: mean cosine between the features of different images, 1 when all are alike.
        knn: accuracy of a nearest-neighbour classifier, None without labels.
        knn_guessing: accuracy, on the images it classifies, of always guessing the commonest class
            of those it looks for neighbours among; None without labels.
        not_finite: images with NaN or infinity among their features, None where there are none.
    """

    effective_rank: float | None = None
    centred_rank: float | None = None
    feature_std: float | None = None
    lowest_std: float | None = None
    cosine: float | None = None
    knn: float | None = None
    knn_guessing: float | None = None
    not_finite: int | None = None


def collapse_panel(features: Tensor, labels: Tensor | None = None) -> Panel:
    """Statistics of (n, D) features; labels (n,) int64 add the kNN accuracy.

    The kNN classifies the second half of the images by the first half.

    Raises:
        ValueError: fewer than two images.
    """
    if features.ndim != 2 or features.shape[0] < 2:
        raise ValueError(f"features must have shape (n >= 2, D), got {tuple(features.shape)}")
    features = features.double()
    not_finite = int((~features.isfinite()).any(dim=1).sum())
    if not_finite:
        return Panel(not_finite=not_finite)
    std = features.std(dim=0)
    accuracy = guessing = None
    if labels is not None:
        half = features.shape[0] // 2
        accuracy = knn_accuracy(features[:half], labels[:half], features[half:], labels[half:])
        guessing = commonest_class_accuracy(labels[:half], labels[half:])
    return Panel(
        effective_rank=effective_rank(features),
        centred_rank=effective_rank(features - features.mean(dim=0)),
        feature_std=std.mean().item(),
        lowest_std=std.min().item(),
        cosine=mean_cosine(features),
        knn=accuracy,
        knn_guessing=guessing,
    )


def panel_line(done: int, panel: Panel) -> str:
    """The panel in one line."""
    if panel.not_finite:
        return f"step {done}: target features of {panel.not_finite} images are not finite"
    knn = ""
    if panel.knn is not None and panel.knn_guessing is not None:
        knn = f"  kNN {100 * panel.knn:.1f} % (guessing {100 * panel.knn_guessing:.1f} %)"
    return (
        f"step {done}: effective rank {panel.effective_rank:.1f}  std {panel.feature_std:.3f}  "
        f"cosine {panel.cosine:.3f}{knn}"
    )


def effective_rank(features: Tensor) -> float:
    """RankMe of (n, D): exp of the entropy of the normalised singular values.

    p_k = sigma_k / sum(sigma) + 1e-7, rank = exp(-sum p_k log p_k) (Garrido et al., 2023).
    """
    singular_values = torch.linalg.svdvals(features)
    p = singular_values / singular_values.sum().clamp(min=_EPS) + _EPS
    return torch.exp(-(p * p.log()).sum()).item()


def mean_cosine(features: Tensor) -> float:
    """Mean cosine over all pairs of different rows of (n, D).

    With unit rows u_i the sum over all pairs, i = j included, is |sum u_i|^2.
    """
    count = features.shape[0]
    unit = F.normalize(features, dim=1)
    return ((unit.sum(dim=0).square().sum() - count) / (count * (count - 1))).item()
