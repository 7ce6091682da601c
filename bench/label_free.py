"""Which figure that needs no labels follows the accuracy of online probes over a run?

    python -m bench.label_free [--by knn] RUN_FOLDER [RUN_FOLDER ...]

Reads the runs' metrics.jsonl. For each figure of the panel, and the loss: Spearman's rank
correlation with `online_linear`, or with another figure, over the looks within each run (mean over
the runs), and over the last looks of all runs together where there are more than two.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from ijepa.report.metrics import read_metrics

FIGURES = (
    "effective_rank", "feature_std", "lowest_std", "cosine", "r2", "position_share",
    "image_share", "interaction_share", "encoder_grad_norm", "loss",
)  # fmt: skip


def ranks(values: ArrayLike) -> np.ndarray:
    """Ranks from 0 of (n,) values, equal ones sharing the mean of theirs."""
    known = np.asarray(values, dtype=np.float64)
    return np.array([((known < v).sum() + (known <= v).sum() - 1) / 2 for v in known])


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Rank correlation in [-1, 1]; NaN where one of the two is constant."""
    a, b = ranks(first), ranks(second)
    a, b = a - a.mean(), b - b.mean()
    length = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / length) if length > 0 else float("nan")


def looks(run: Path, accuracy: str) -> list[dict[str, float]]:
    """The figures of every look after the first step, of one step together."""
    steps: dict[int, dict[str, float]] = {}
    for line in read_metrics(run):
        steps.setdefault(line["step"], {}).update(line)
    return [figures for step, figures in sorted(steps.items()) if step and accuracy in figures]


def main(runs: Sequence[str], accuracy: str = "online_linear") -> None:
    found = [looks(Path(run), accuracy) for run in runs]
    print(f"{len(runs)} runs, {[len(run) for run in found]} looks; accuracies at the end "
          f"{[round(run[-1][accuracy], 3) for run in found]}")  # fmt: skip
    print("| figure | within a run, mean (each) | over the runs' ends |\n| --- | --- | --- |")
    for figure in FIGURES:
        each = []
        for run in found:
            known = [look for look in run if figure in look]
            if len(known) > 2:
                pair = [look[figure] for look in known], [look[accuracy] for look in known]
                each.append(spearman(*pair))
        ends = [run[-1] for run in found if figure in run[-1]]
        over = "-"
        if len(ends) > 2:
            over = f"{spearman([e[figure] for e in ends], [e[accuracy] for e in ends]):+.2f}"
        if each:
            listed = ", ".join(f"{value:+.2f}" for value in each)
            print(f"| {figure} | {np.mean(each):+.2f} ({listed}) | {over} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--by", default="online_linear", help="the accuracy to follow")
    given = parser.parse_args()
    main(given.runs, given.by)
