"""Whitened features: a few strong directions no longer decide which images are near.

Average-pooled features differ mostly in colour and brightness; what else they tell apart lies in
directions of small variance, where a linear probe finds it and plain cosines do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of the mean variance, added to that of every direction: those that hold nothing stay small.
RIDGE = 1e-3


@torch.no_grad()
def whiten(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, D) and (m, D), centred and turned until the training rows' covariance is about one.

    y = L^-1 (x - mean) with L L^T = covariance + ridge * (trace / D) * identity. Any other square
    root of the covariance gives the same rows but for a rotation, which no cosine sees.

    Raises:
        ValueError: features of different widths, or of no row.
    """
    if train.ndim != 2 or train.shape[1:] != test.shape[1:] or train.shape[0] == 0:
        raise ValueError(
            f"features (n > 0, D) and (m, D) expected, got {tuple(train.shape)} and "
            f"{tuple(test.shape)}"
        )
    mean = train.mean(dim=0)
    centred = (train - mean).double()
    covariance = centred.T @ centred / train.shape[0]  # (D, D)
    spread = covariance.diagonal().mean().clamp(min=1e-12)
    covariance.diagonal().add_(RIDGE * spread)
    factor = torch.linalg.cholesky(covariance).to(train.dtype)

    def turned(rows: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(factor, (rows - mean).T, upper=False).T.contiguous()

    return turned(train), turned(test)
