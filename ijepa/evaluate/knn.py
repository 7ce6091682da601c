"""Nearest neighbours by cosine, each voting with exp(cosine / temperature)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = (10, 20, 100, 200)


@torch.no_grad()
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    neighbours: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of test rows whose neighbours' vote is right, in [0, 1]; see `knn_accuracies`."""
    accuracies = knn_accuracies(
        train_features,
        train_labels,
        test_features,
        test_labels,
        neighbours=(neighbours,),
        temperature=temperature,
    )
    return accuracies[neighbours]


@torch.no_grad()
def knn_accuracies(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = 0.07,
    test_rows: int = 1024,
    train_rows: int = 65_536,
    device: str | torch.device | None = None,
) -> dict[int, float]:
    """Number of neighbours -> share of test rows whose neighbours' vote is right, in [0, 1].

    Cosines are taken of features less the mean of the training rows: average-pooled features share
    a large common part (every image has the same positions), which would make all of them alike.
    Where there are fewer training rows than neighbours, all of them vote.

    Args:
        train_features, test_features: (n, D) and (m, D), floating point.
        train_labels, test_labels: (n,) and (m,) int64, from 0.
        test_rows, train_rows: compared at once, which bounds the memory.
        device: where to compute, a piece at a time; default: where the features are.

    Raises:
        ValueError: shapes that do not belong together, or no number of neighbours.
    """
    for name, features, labels in (
        ("train", train_features, train_labels),
        ("test", test_features, test_labels),
    ):
        if features.ndim != 2 or labels.shape != features.shape[:1]:
            raise ValueError(
                f"{name} features (n, D) and labels (n,) expected, got "
                f"{tuple(features.shape)} and {tuple(labels.shape)}"
            )
    if not neighbours or min(neighbours) < 1:
        raise ValueError(f"neighbours must be numbers of at least 1, got {tuple(neighbours)}")
    device = torch.device(device or train_features.device)
    mean = train_features.mean(dim=0).to(device)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    labels_there = train_labels.to(device)
    most = min(max(neighbours), train_features.shape[0])
    correct = dict.fromkeys(neighbours, 0)
    for start in range(0, test_features.shape[0], test_rows):
        query = F.normalize(test_features[start : start + test_rows].to(device) - mean, dim=1)
        cosine, nearest = _nearest(query, train_features, mean, most, train_rows)  # (b, most)
        votes = (cosine / temperature).exp()
        expected = test_labels[start : start + test_rows].to(device)
        for count in correct:
            total = torch.zeros(query.shape[0], classes, dtype=votes.dtype, device=device)
            total.scatter_add_(1, labels_there[nearest[:, :count]], votes[:, :count])
            correct[count] += int((total.argmax(dim=1) == expected).sum())
    return {count: right / test_features.shape[0] for count, right in correct.items()}


def _nearest(
    query: Tensor, train_features: Tensor, mean: Tensor, count: int, rows: int
) -> tuple[Tensor, Tensor]:
    """Cosines and numbers (b, count) of the nearest training rows, the nearest first."""
    best: tuple[Tensor, Tensor] | None = None
    for start in range(0, train_features.shape[0], rows):
        piece = train_features[start : start + rows].to(query.device)
        bank = F.normalize(piece - mean, dim=1)  # (r, D)
        cosine, place = (query @ bank.T).topk(min(count, bank.shape[0]), dim=1)
        place += start
        if best is not None:
            cosine, place = torch.cat([best[0], cosine], 1), torch.cat([best[1], place], 1)
            cosine, chosen = cosine.topk(min(count, cosine.shape[1]), dim=1)
            place = place.gather(1, chosen)
        best = cosine, place
    assert best is not None
    return best
