"""curves.png: loss, learning rate, the panel's figures and mask examples of a run.

Needs matplotlib (extra `plots`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_INK, _MUTED, _GRID = "#22313f", "#7b8a97", "#e3e8ec"
_BLUE, _ORANGE, _GREEN, _PURPLE = "#2e86c1", "#e25822", "#27ae60", "#8e44ad"


def plot_curves(
    metrics: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    title: str,
    mask_examples: np.ndarray | None = None,
) -> None:
    """Draw a run's metrics into a PNG file.

    Args:
        metrics: lines of metrics.jsonl.
        title: above the curves, and in the file's metadata.
        mask_examples: (H, W, 3) uint8 from `draw_mask_examples`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.size": 9,
        "text.color": _INK,
        "axes.edgecolor": _MUTED,
        "axes.labelcolor": _INK,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
    }
    with rc_context(style):
        figure = Figure(figsize=(12, 12.4 if mask_examples is not None else 8.8))
        title_style = {"fontsize": 14, "fontweight": "bold", "parse_math": False}  # $ is no formula
        figure.suptitle(title, x=0.01, ha="left", **title_style)
        figure.set_layout_engine("constrained", h_pad=0.09, w_pad=0.09)
        ratios = [1, 1, 1, 1.55] if mask_examples is not None else [1, 1, 1]
        grid = figure.add_gridspec(len(ratios), 3, height_ratios=ratios)
        axes = [figure.add_subplot(grid[row, column]) for row in (0, 1, 2) for column in (0, 1, 2)]
        _draw_loss(axes[0], metrics)
        _draw_line(axes[1], metrics, "lr", "learning rate", _ORANGE)
        axes[1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        _draw_line(axes[2], metrics, "grad_norm", "gradient norm", _MUTED, smooth=True)
        _draw_ranks(axes[3], metrics)
        _draw_spread(axes[4], metrics)
        _draw_knn(axes[5], metrics)
        _draw_r2(axes[6], metrics)
        _draw_shares(axes[7], metrics)
        _draw_line(axes[8], metrics, "encoder_grad_norm", "encoder's gradient norm", _ORANGE, "o")
        if mask_examples is not None:
            _draw_masks(figure.add_subplot(grid[3, :]), mask_examples)
        figure.savefig(path, dpi=110, facecolor="white", metadata={"Title": title})


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """(n,) -> (n,) means over the last `window` values, fewer at the start."""
    total = np.cumsum(np.insert(values, 0, 0.0))
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - window, 0)
    return (total[last] - total[first]) / (last - first)


def _series(metrics, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the lines that hold `name`."""
    pairs = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
    return (*np.array(pairs, dtype=float).reshape(-1, 2).T,)


def _prepare(axis, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axis.grid(color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.02)
    axis.tick_params(length=0)


def _draw_line(axis, metrics, name, title, color, marker=None, smooth=False) -> None:
    _prepare(axis, title)
    steps, values = _series(metrics, name)
    if smooth and len(values):
        axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        values = running_mean(values, max(len(values) // 40, 1))
    axis.plot(steps, values, color=color, linewidth=1.8, marker=marker, markersize=4)
    _start_at_zero(axis)


def _start_at_zero(axis) -> None:
    """Small changes should look small."""
    axis.set_ylim(0, max(1.06 * axis.get_ylim()[1], 1e-12))


def _draw_loss(axis, metrics) -> None:
    _draw_line(axis, metrics, "loss", "loss", _BLUE, smooth=True)
    values = _series(metrics, "loss")[1]
    if len(values) > 20:  # the first steps would flatten everything after them
        axis.set_ylim(0, 1.25 * np.quantile(values[len(values) // 20 :], 0.995))


def _draw_several(axis, metrics, title: str, lines: Sequence[tuple[str, str, str]]) -> None:
    """Figures of the panel on one axis: (name, label, color) each."""
    _prepare(axis, title)
    for name, label, color in lines:
        steps, values = _series(metrics, name)
        axis.plot(steps, values, color=color, linewidth=1.8, marker="o", markersize=4, label=label)
    axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
    axis.legend(frameon=False, fontsize=8)


def _draw_ranks(axis, metrics) -> None:
    lines = (
        ("effective_rank", "as they are", _PURPLE),
        ("centred_rank", "less their mean", _BLUE),
    )
    _draw_several(axis, metrics, "effective rank (RankMe)", lines)


def _draw_spread(axis, metrics) -> None:
    lines = (
        ("cosine", "mean cosine", _ORANGE),
        ("feature_std", "mean std", _GREEN),
        ("lowest_std", "lowest std", _MUTED),
    )
    _draw_several(axis, metrics, "target features over images", lines)


def _draw_shares(axis, metrics) -> None:
    lines = (
        ("position_share", "position", _ORANGE),
        ("image_share", "image", _PURPLE),
        ("interaction_share", "this patch of this image", _GREEN),
    )
    _draw_several(axis, metrics, "shares of the targets' variance", lines)
    axis.set_ylim(0, 1)


def _draw_r2(axis, metrics) -> None:
    """An untrained predictor lies far below 0, which would flatten the rest."""
    _prepare(axis, "predicted beyond the position's mean (R2)")
    steps, values = _series(metrics, "r2")
    if not len(values):
        return
    axis.plot(steps, values, color=_BLUE, linewidth=1.8, marker="o", markersize=4)
    axis.axhline(0, color=_MUTED, linewidth=1, linestyle="--")
    axis.set_ylim(-0.1, max(1.15 * values.max(), 0.1))


def _draw_knn(axis, metrics) -> None:
    _prepare(axis, "online kNN accuracy")
    steps, values = _series(metrics, "knn")
    if not len(values):
        axis.text(0.5, 0.5, "no labels", ha="center", color=_MUTED, transform=axis.transAxes)
        return
    axis.plot(steps, 100 * values, color=_GREEN, linewidth=1.8, marker="o", markersize=4)
    guessing = _series(metrics, "knn_guessing")[1]  # of the same images, so one value
    if len(guessing):
        axis.axhline(100 * guessing[-1], color=_MUTED, linewidth=1, linestyle="--")
        axis.text(steps[-1], 100 * guessing[-1], "guessing ", ha="right", va="bottom", color=_MUTED)
    axis.yaxis.set_major_formatter("{x:.0f} %")
    _start_at_zero(axis)


def _draw_masks(axis, picture: np.ndarray) -> None:
    axis.imshow(picture, interpolation="nearest")
    axis.set_title(
        "image, context (what is seen), target blocks (what is predicted)",
        loc="left", fontsize=10, fontweight="bold",
    )  # fmt: skip
    axis.axis("off")
