"""The images of an embedded folder that lie nearest to a query."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_ROWS_AT_ONCE = 65_536


@dataclass(frozen=True)
class Neighbour:
    """Row of an image among the features, and its cosine with the query."""

    row: int
    cosine: float


def nearest(features: np.ndarray, query: np.ndarray, count: int) -> list[Neighbour]:
    """The `count` rows with the highest cosine to the query, the nearest first.

    The mean of all rows is taken off first: average-pooled features share a large common part
    (every image has the same positions), which would make all cosines alike.

    Args:
        features: (n, D) float32, read in pieces: it may be larger than memory.
        query: (D,).

    Raises:
        ValueError: shapes that do not belong together, or no row.
    """
    if features.ndim != 2 or query.shape != features.shape[1:] or not len(features):
        raise ValueError(
            f"features (n, D) and a query (D,) expected, got {features.shape} and {query.shape}"
        )
    pieces = [slice(at, at + _ROWS_AT_ONCE) for at in range(0, len(features), _ROWS_AT_ONCE)]
    total = sum(features[piece].sum(axis=0, dtype=np.float64) for piece in pieces)
    mean = total / len(features)  # (D,)
    direction = query.astype(np.float64) - mean
    direction /= max(float(np.linalg.norm(direction)), 1e-12)
    cosines = np.empty(len(features))
    for piece in pieces:
        centred = features[piece] - mean  # (b, D) float64
        lengths = np.maximum(np.linalg.norm(centred, axis=1), 1e-12)
        cosines[piece] = centred @ direction / lengths
    order = np.argsort(-cosines, kind="stable")[:count]
    return [Neighbour(int(row), float(cosines[row])) for row in order]
