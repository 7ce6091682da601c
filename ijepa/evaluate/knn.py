"""Nearest neighbours by cosine, each voting with exp(cosine / temperature)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    neighbours: int = 20,
    temperature: float = 0.07,
    batch_size: int = 1024,
) -> float:
    """Share of test rows whose neighbours' vote is right, in [0, 1].

    Args:
        train_features, test_features: (n, D) and (m, D), floating point.
        train_labels, test_labels: (n,) and (m,) int64, from 0.

    Raises:
        ValueError: shapes that do not belong together.
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
    # Average-pooled features share a large common part (every image has the same positions), which
    # would make all cosines alike.
    mean = train_features.mean(dim=0)
    bank = F.normalize(train_features - mean, dim=1)  # (n, D)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    neighbours = min(neighbours, bank.shape[0])
    correct = 0
    for start in range(0, test_features.shape[0], batch_size):
        stop = start + batch_size
        query = F.normalize(test_features[start:stop] - mean, dim=1)
        cosine, nearest = (query @ bank.T).topk(neighbours, dim=1)  # (b, k)
        votes = torch.zeros(query.shape[0], classes, dtype=cosine.dtype, device=cosine.device)
        votes.scatter_add_(1, train_labels[nearest], (cosine / temperature).exp())
        correct += int((votes.argmax(dim=1) == test_labels[start:stop]).sum())
    return correct / test_features.shape[0]
