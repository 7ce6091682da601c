"""What the runs of a comparison found: a table with mean and spread, a plot, the paper's figures
beside, and what carries over."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ijepa.ablate.runs import PlannedRun
from ijepa.ablate.tables import Comparison, Variant
from ijepa.disk import write_whole, written_aside
from ijepa.report.probes import Probes, read_probes

MAIN = "linear probe, last 4 blocks"
_ROWS = {  # our name -> (row of the closing table, its score)
    MAIN: ("pretrained, last 4 blocks", "linear"),
    "linear probe, mean and std": ("pretrained, last 4 blocks, mean and std", "linear"),
    "whitened kNN, last block": ("pretrained, last block", "whitened_knn"),
}
_SURE = 2.0  # standard errors of a difference


@dataclass(frozen=True)
class Row:
    """A variant's figures.

    Attributes:
        scores: what was measured -> an accuracy in [0, 1] for each seed that is over.
        seeds: of those runs.
    """

    variant: Variant
    scores: dict[str, list[float]]
    seeds: list[int]


def mean(values: Sequence[float]) -> float:
    """The mean; NaN of none."""
    return sum(values) / len(values) if values else math.nan


def spread(values: Sequence[float]) -> float:
    """Standard deviation of a sample (n - 1); NaN of fewer than two."""
    if len(values) < 2:
        return math.nan
    middle = mean(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1))


def gather(comparison: Comparison, planned: Sequence[PlannedRun], task: str | None) -> list[Row]:
    """The figures of all runs that are over, of one task (default: the first)."""
    rows = []
    for variant in comparison.variants:
        scores: dict[str, list[float]] = {name: [] for name in _ROWS}
        seeds = []
        for run in planned:
            if run.variant is not variant or not run.over:
                continue
            found = _scores(read_probes(run.folder), task, run.folder)
            if found is None:
                continue
            seeds.append(run.seed)
            for name, value in found.items():
                scores[name].append(value)
        rows.append(Row(variant, scores, seeds))
    return rows


def _scores(probes: Probes | None, task: str | None, folder: Path) -> dict[str, float] | None:
    """Our name -> accuracy; None of a run whose features were not finite."""
    if probes is None:
        return None
    chosen = next(iter(probes.chance)) if task is None else task
    if chosen not in probes.chance:
        raise ValueError(f"{folder} has no task {chosen!r}, but {', '.join(probes.chance)}")
    by_name = {row.features: row for row in probes.rows}
    found = {}
    for name, (row, score) in _ROWS.items():
        if row in by_name and chosen in by_name[row].scores:
            found[name] = getattr(by_name[row].scores[chosen], score)
    return found if len(found) == len(_ROWS) else None


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Header and lines of the table, in percent; the paper's column where it has one."""
    papers = any(row.variant.paper is not None for row in rows)
    header = ["", *_ROWS, "seeds", *(["paper"] if papers else [])]
    lines = [header]
    for row in rows:
        figures = [_percent(row.scores[name]) for name in _ROWS]
        value = row.variant.paper
        paper = [] if not papers else ["" if value is None else f"{value:.1f}"]
        lines.append([row.variant.name, *figures, str(len(row.seeds)), *paper])
    return lines


def _percent(values: Sequence[float]) -> str:
    if not values:
        return "not yet"
    if len(values) < 2:
        return f"{100 * mean(values):.1f}"
    return f"{100 * mean(values):.1f} ± {100 * spread(values):.1f}"


def carries_over(rows: Sequence[Row]) -> list[str]:
    """Sentences on which of the paper's orders are found here, of every two rows.

    Two rows differ where their means are more than two standard errors of the difference apart;
    with fewer than two seeds nothing can be said.
    """
    same: list[str] = []
    reversed_: list[str] = []
    open_: list[str] = []
    for first, second in itertools.combinations(rows, 2):
        paper_first, paper_second = first.variant.paper, second.variant.paper
        if paper_first is None or paper_second is None:
            continue
        if paper_first < paper_second:
            first, second = second, first
        names = f"{first.variant.name} over {second.variant.name}"
        a, b = first.scores[MAIN], second.scores[MAIN]
        if len(a) < 2 or len(b) < 2:
            open_.append(names)
            continue
        error = math.sqrt(spread(a) ** 2 / len(a) + spread(b) ** 2 / len(b))
        difference = mean(a) - mean(b)
        if abs(difference) <= _SURE * error:
            open_.append(names)
        else:
            (same if difference > 0 else reversed_).append(names)
    kinds = (("Found here too", same), ("The other way round here", reversed_),
             ("Not told apart here", open_))  # fmt: skip
    return [f"{kind}: {'; '.join(names)}." for kind, names in kinds if names]


def write_results(
    comparison: Comparison, rows: Sequence[Row], folder: Path, about: str
) -> list[Path]:
    """table.md, results.json and, where matplotlib is installed, plot.png.

    Args:
        about: what the runs were, a sentence.

    Raises:
        NotWritten: no room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    header, *lines = cells(rows)
    table = [header, ["---"] * len(header), *lines]
    parts = [
        f"# {comparison.name.replace('-', ' ').capitalize()}: {comparison.title}",
        about,
        "\n".join("| " + " | ".join(line) + " |" for line in table),
        "Accuracy in percent on held-out images, mean and standard deviation over the seeds.",
    ]
    if comparison.protocol:
        parts += [f"The paper's: {comparison.protocol}.", *carries_over(rows)]
    written = [folder / "table.md", folder / "results.json"]
    write_whole(written[0], "\n\n".join(parts) + "\n")
    write_whole(written[1], json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return written
    with written_aside(folder / "plot.png") as path:
        _plot(comparison, rows, path)
    return [*written, folder / "plot.png"]


def _plot(comparison: Comparison, rows: Sequence[Row], path: Path) -> None:
    """A dot a run, a bar a mean; the paper's order beside, where it has one."""
    from matplotlib.figure import Figure

    papers = [row.variant.paper for row in rows]
    sides = 2 if None not in papers else 1
    figure = Figure(figsize=(5.2 * sides, 1.2 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots(1, sides, squeeze=False)[0]
    places = list(range(len(rows)))[::-1]
    names = [row.variant.name for row in rows]
    for axis in axes:
        axis.set_yticks(places, names, parse_math=False)
        axis.set_ylim(-0.6, len(rows) - 0.4)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", color="#e3e8ec")
        axis.set_axisbelow(True)
    for place, row in zip(places, rows, strict=True):
        values = [100 * value for value in row.scores[MAIN]]
        axes[0].barh(place, mean(values) if values else 0, color="#a9cce3", height=0.6)
        axes[0].plot(values, [place] * len(values), "o", color="#1f618d", markersize=5)
    axes[0].set_xlabel("% " + MAIN)
    axes[0].set_title(f"here: {comparison.title}", loc="left", fontsize=10, parse_math=False)
    if sides == 2:
        axes[1].barh(places, papers, color="#f5cba7", height=0.6)
        axes[1].set_xlabel("% in the paper")
        axes[1].set_title(f"paper, {comparison.name.replace('-', ' ')}", loc="left", fontsize=10)
    figure.savefig(path, dpi=110, facecolor="white")
