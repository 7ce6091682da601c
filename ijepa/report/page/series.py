"""Figures of a run's log as curves: finite numbers only, and few enough points for a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ijepa.evaluate.warnings import (
    HIGHEST_IMAGE_SHARE,
    LOWEST_ENCODER_GRADIENT,
    LOWEST_R2,
    LOWEST_RANK_SHARE,
)

MOST_POINTS = 800  # of a curve
FEW_POINTS = 60  # up to which points are marked and not smoothed
_MOST_OTHER_CURVES = 24
_NOT_DRAWN = {"step", "skipped", "knn_guessing", "not_finite"}


@dataclass(frozen=True)
class Curve:
    """A figure that can be drawn.

    Attributes:
        name: in the log.
        title: for people.
        panel: whether it belongs to the collapse panel.
        low, high: ends of the healthy band, None where it is open.
        collapsed: the value of targets that have become constant.
        healthy: the band in words.
    """

    name: str
    title: str
    panel: bool = True
    low: float | None = None
    high: float | None = None
    collapsed: float | None = None
    healthy: str = ""


@dataclass(frozen=True)
class Line:
    """One run's points of a curve: steps and values, at most `MOST_POINTS`."""

    run: int
    steps: list[float]
    values: list[float]

    @property
    def many(self) -> bool:
        """Whether they are smoothed rather than marked."""
        return len(self.steps) > FEW_POINTS


def curves(width: int | None, guessing: float | None) -> list[Curve]:
    """What is drawn of every run, with the healthy bands that the program itself warns by.

    Args:
        width: of the encoder, which the rank is judged by; None where runs differ or it is unknown.
        guessing: accuracy of guessing on the panel's images, None without labels.
    """
    rank = None if width is None else LOWEST_RANK_SHARE * width
    return [
        Curve("loss", "loss", panel=False),
        Curve("lr", "learning rate", panel=False),
        Curve("grad_norm", "gradient norm", panel=False),
        Curve("effective_rank", "effective rank (RankMe)", collapsed=1.0,
              healthy="grows; collapsed at 1"),
        Curve("centred_rank", "effective rank, less the mean", low=rank, collapsed=1.0,
              healthy="" if rank is None else
              f"healthy above {rank:.3g}, {LOWEST_RANK_SHARE:.0%} of the width"),
        Curve("feature_std", "std over images, mean of dimensions", collapsed=0.0,
              healthy="collapsed at 0"),
        Curve("lowest_std", "std over images, lowest dimension", collapsed=0.0,
              healthy="collapsed at 0"),
        Curve("cosine", "mean cosine between images", collapsed=1.0, healthy="collapsed at 1"),
        Curve("knn", "online kNN accuracy", low=guessing,
              healthy="" if guessing is None else f"guessing {guessing:.1%}"),
        Curve("r2", "R2: predicted of what the position leaves open", low=LOWEST_R2,
              healthy=f"healthy above {LOWEST_R2}"),
        Curve("image_share", "targets' variance: image", high=HIGHEST_IMAGE_SHARE,
              healthy=f"healthy below {HIGHEST_IMAGE_SHARE:.0%}"),
        Curve("position_share", "targets' variance: position"),
        Curve("interaction_share", "targets' variance: this patch of this image"),
        Curve("encoder_grad_norm", "gradient norm of the encoder", low=LOWEST_ENCODER_GRADIENT,
              healthy=f"healthy above {LOWEST_ENCODER_GRADIENT:.0e}"),
    ]  # fmt: skip


def other_curves(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[Curve]:
    """Whatever else the logs hold that is a number, in the order of its name."""
    known = {curve.name for curve in curves(None, None)} | _NOT_DRAWN
    names = {
        name
        for metrics in runs
        for line in metrics
        for name, value in line.items()
        if name not in known and finite(value)
    }
    return [
        Curve(name, name.replace("_", " "), panel=False)
        for name in sorted(names)[:_MOST_OTHER_CURVES]
    ]


def line_of(metrics: Sequence[Mapping[str, Any]], name: str, run: int) -> Line | None:
    """A run's points of one figure, thinned to means over equal parts; None without any."""
    pairs = sorted(
        (float(line["step"]), float(line[name]))
        for line in metrics
        if finite(line.get("step")) and finite(line.get(name))
    )
    if not pairs:
        return None
    per_point = -(-len(pairs) // MOST_POINTS)
    parts = [pairs[at : at + per_point] for at in range(0, len(pairs), per_point)]
    return Line(
        run,
        [_rounded(sum(step for step, _ in part) / len(part)) for part in parts],
        [_rounded(sum(value for _, value in part) / len(part)) for part in parts],
    )


def finite(value: Any) -> bool:
    """Whether a value of a log is a number that can be drawn."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
