"""A linear probe: multinomial logistic regression on standardised frozen features.

Fitted by L-BFGS over the whole training set at once, so it needs no learning rate and no
shuffling and gives the same figure every time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# On half of the squared weights, beside the mean cross entropy; strongest first, each fit starting
# from the one before.
PENALTIES = (1e-2, 1e-3, 1e-4, 1e-5)
# Roughly the curvature of the cross entropy in a logit, p (1 - p), for ten classes.
_CURVATURE = 0.1


def linear_probe_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    penalties: tuple[float, ...] = PENALTIES,
    iterations: int = 60,
) -> float:
    """Accuracy on the test rows, in [0, 1], with the penalty that held-out rows prefer.

    A fifth of the training rows chooses among the penalties; the test rows have no say in it.
    The probe is then fitted on all training rows.

    Args:
        train_features, test_features: (n, D) and (m, D), floating point.
        train_labels, test_labels: (n,) and (m,) int64, from 0.

    Raises:
        ValueError: features of different widths, or no penalty.
    """
    if train_features.ndim != 2 or train_features.shape[1:] != test_features.shape[1:]:
        raise ValueError(
            f"features must have shapes (n, D) and (m, D), got {tuple(train_features.shape)} "
            f"and {tuple(test_features.shape)}"
        )
    if not penalties:
        raise ValueError("penalties must not be empty")
    train, test = _standardise(train_features, test_features)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    best = penalties[0]
    if len(penalties) > 1:
        held_out = _held_out(train.shape[0]).to(train.device)
        fitted = _Rows(train[~held_out], train_labels[~held_out], classes)
        scores, head = [], None
        for penalty in penalties:
            head = _fit(fitted, penalty, iterations, head)
            scores.append(_accuracy(head, train[held_out], train_labels[held_out]))
        best = penalties[scores.index(max(scores))]
    head = _fit(_Rows(train, train_labels, classes), best, iterations)
    return _accuracy(head, test, test_labels)


def _held_out(rows: int) -> Tensor:
    """(n,) bool: a fifth of the rows by a fixed draw. Every fifth row would hold out a few classes
    alone where the labels of the rows repeat, as those of rendered images do."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    return order < max(rows // 5, 1)


class _Rows:
    """Standardised rows to fit on: features (n, D), labels (n,) below `classes`."""

    def __init__(self, features: Tensor, labels: Tensor, classes: int):
        self.features, self.labels, self.classes = features, labels, classes
        wide = features.double()
        self.covariance = wide.T @ wide / max(features.shape[0], 1)  # (D, D) float64


def _standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both to zero mean and unit variance per dimension, as the training rows have them."""
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0)
    scale = 1.0 / std.clamp(min=1e-6)
    return (train - mean) * scale, (test - mean) * scale


def _fit(
    rows: _Rows, penalty: float, iterations: int, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Weight (classes, D) and bias (classes,) of the penalised maximum-likelihood solution.

    Average-pooled features are close to collinear, and plain L-BFGS stops far from the solution.
    It runs on `directions` instead, weight = directions @ inverse(factor), in which the objective
    is about equally curved everywhere: factor @ factor.T is its Hessian where all classes are
    equally likely. The solution is the same.
    """
    features, width = rows.features, rows.features.shape[1]
    factor = _hessian_factor(rows.covariance, penalty)
    identity = torch.eye(width, dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False).to(features.dtype)
    turned = features @ inverse.T  # (n, D)
    zeros = features.new_zeros(rows.classes, width), features.new_zeros(rows.classes)
    weight, bias = start or zeros
    directions = (weight @ factor.to(features.dtype)).requires_grad_()
    bias = bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [directions, bias],
        max_iter=iterations,
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(turned, directions, bias), rows.labels)
        loss = loss + 0.5 * penalty * (directions @ inverse).square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    return directions.detach() @ inverse, bias.detach()


def _hessian_factor(covariance: Tensor, penalty: float) -> Tensor:
    """Cholesky factor (D, D), float64, of curvature * covariance + penalty * identity."""
    identity = torch.eye(covariance.shape[0], dtype=covariance.dtype, device=covariance.device)
    return torch.linalg.cholesky(_CURVATURE * covariance + penalty * identity)


@torch.no_grad()
def _accuracy(head: tuple[Tensor, Tensor], features: Tensor, labels: Tensor) -> float:
    predicted = F.linear(features, *head).argmax(dim=1)
    return (predicted == labels).double().mean().item()
