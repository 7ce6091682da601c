"""Patch features as colours: their three main directions are red, green and blue.

Colours of one basis mean the same in all of its images. Networks that share a feature space, as
checkpoints of one run do, can share a basis; where each network has its own, the bases are turned
(an orthogonal map, by Procrustes) towards the first one's colours, so that like is shown alike as
far as a rotation allows, and nothing else is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Basis = Literal["one", "each"]
_SPREAD = 2.5  # standard deviations from the middle of the colour range to its end


def pca_colours(features: Sequence[Tensor], basis: Basis) -> list[Tensor]:
    """Colours of the same patches by several networks.

    Args:
        features: of each network (B, N, D), float, finite; the same B and N.
        basis: "one" for all of them together, which takes the same D; or "each" its own.

    Returns:
        (B, N, 3) uint8 for each network.

    Raises:
        ValueError: shapes that do not fit together, or features that are not finite.
    """
    if not features:
        raise ValueError("pca needs the features of at least one network")
    shapes = {tuple(f.shape[:2]) for f in features}
    if len(shapes) > 1:
        raise ValueError(f"all networks must look at the same patches, got {sorted(shapes)}")
    if not all(bool(f.isfinite().all()) for f in features):
        raise ValueError("features are not finite: the network has diverged")
    rows = [f.double().flatten(0, 1) for f in features]  # (B * N, D)
    if basis == "one":
        if len({f.shape[1] for f in rows}) > 1:
            widths = ", ".join(str(f.shape[1]) for f in rows)
            raise ValueError(
                f"one basis needs features of one width, got {widths}: give each its own "
                "(--basis each)"
            )
        scores = list(_scores(torch.cat(rows)).split(len(rows[0])))
    else:
        first, *others = [_scores(f) for f in rows]
        scores = [first, *(_turned(f, first) for f in others)]
    scale = scores[0].std(dim=0, correction=0).max().clamp(min=1e-12)
    colours = []
    for number, score in enumerate(scores):
        own = scale if basis == "one" else score.std(dim=0, correction=0).max().clamp(min=1e-12)
        unit = 0.5 + score / (2 * _SPREAD * own)
        pixels = (unit.clamp(0, 1) * 255).round().byte()
        colours.append(pixels.view(*features[number].shape[:2], 3))
    return colours


def _scores(rows: Tensor) -> Tensor:
    """(R, D) -> (R, 3) along the three main directions, each with a sign that is its own: the
    direction's largest entry is positive. Missing directions are zero."""
    centred = rows - rows.mean(dim=0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = directions[:3]  # (<= 3, D)
    largest = directions.abs().argmax(dim=1, keepdim=True)
    directions = directions * directions.gather(1, largest).sign()
    scores = centred @ directions.T
    missing = 3 - scores.shape[1]
    return torch.nn.functional.pad(scores, (0, missing))


def _turned(scores: Tensor, towards: Tensor) -> Tensor:
    """(R, 3) turned by the orthogonal map that brings them closest to `towards`."""
    u, _, v = torch.linalg.svd(scores.T @ towards)
    return scores @ (u @ v)
