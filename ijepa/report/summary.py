"""The end of a run: the closing table, summary.md, masks.png and curves.png."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from ijepa.config import Recipe
from ijepa.disk import write_whole, written_aside
from ijepa.evaluate.closing import ProbeRow
from ijepa.evaluate.warnings import learning_warnings
from ijepa.printable import printable
from ijepa.report.metrics import read_metrics
from ijepa.report.probes import Probes, write_probes
from ijepa.report.progress import format_seconds
from ijepa.versions import versions

PROBES = ("linear probe", "whitened kNN", "kNN")  # columns of the closing table, once a task
PLOTS_NOTE = "curves.png is left out: it needs matplotlib (pip install 'ijepa[plots]')"


@dataclass(frozen=True)
class RunReport:
    """What there is to tell about a finished run.

    Attributes:
        folder: of the run.
        recipe: its settings, lengths in steps.
        images: number of training images.
        seconds: time spent, over all parts of a resumed run.
        skipped_steps: updates left out because something was not finite.
        unreadable: the first damaged images met, as "path: reason".
        unreadable_count: how many there were in all.
        first_step: where this part of a resumed run began; damaged images are counted from there.
        left_out: FIFOs, sockets and devices among the images, as "path: kind"; never opened.
        chance: task -> accuracy of guessing the commonest fitted class; empty without probes.
        probes: rows of the closing table, empty without labels.
        no_probes: why there are none though there are labels.
    """

    folder: Path
    recipe: Recipe
    images: int
    seconds: float
    skipped_steps: int = 0
    unreadable: Sequence[str] = ()
    unreadable_count: int = 0
    first_step: int = 0
    left_out: Sequence[str] = ()
    chance: Mapping[str, float] = field(default_factory=dict)
    probes: Sequence[ProbeRow] = ()
    no_probes: str | None = None


def write_report(report: RunReport, mask_examples: np.ndarray) -> None:
    """Write pictures and summary into the run's folder.

    Args:
        mask_examples: (H, W, 3) uint8.

    Raises:
        NotWritten: a file finds no room.
    """
    with written_aside(report.folder / "masks.png") as path:
        Image.fromarray(mask_examples).save(path)
    if _plots():
        from ijepa.visualize.curves import plot_curves

        with written_aside(report.folder / "curves.png") as path:
            plot_curves(
                read_metrics(report.folder),
                path,
                title=printable(report.folder.name),
                mask_examples=mask_examples,
            )
    write_summary(report)


def write_summary(report: RunReport) -> None:
    """Write summary.md, and probes.json where there are probes, into the run's folder.

    Raises:
        NotWritten: there is no room; the old one, if any, is as it was.
    """
    text = summary_text(report, read_metrics(report.folder), _plots())
    write_whole(report.folder / "summary.md", text)
    if report.probes:
        write_probes(report.folder, Probes(report.chance, report.probes))


def show_incidents(report: RunReport, console: Console) -> None:
    """What the summary says more about."""
    if report.unreadable_count:
        console.print(f"{_unreadable(report)}: see summary.md", highlight=False, markup=False)


def show_probes(report: RunReport, console: Console) -> None:
    """The closing table, or why there is none."""
    if report.probes:
        console.print(closing_rich_table(report))
    if report.no_probes:
        console.print(f"No probes: {report.no_probes}.", highlight=False, markup=False)


def show_files(report: RunReport, console: Console) -> None:
    """Where the report is."""
    if not _plots():
        console.print(PLOTS_NOTE, highlight=False, markup=False)
    files = "summary.md, curves.png" if _plots() else "summary.md, masks.png"
    text = f"Results: {report.folder} ({files}, metrics.jsonl, checkpoints)"
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _plots() -> bool:
    """Whether what draws the curves is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def closing_rich_table(report: RunReport) -> Table:
    """The probes as a table for the terminal; the pretrained rows stand out."""
    header, *rows = probe_cells(Probes(report.chance, report.probes))
    table = Table(title="Accuracy on held-out images", title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row, style="bold green" if row[0].startswith("pretrained") else "")
    return table


def probe_cells(probes: Probes) -> list[list[str]]:
    """Header and rows of the closing table; the last row is guessing."""
    tasks = list(probes.chance)
    header = ["features of"]
    for task in tasks:
        prefix = f"{task}: " if len(tasks) > 1 else ""
        header += [f"{prefix}{probe}" for probe in PROBES]
    cells = [header]
    for row in probes.rows:
        if not row.scores:
            cells.append([row.features, *["not finite"] * (len(PROBES) * len(tasks))])
            continue
        scores = [row.scores[task] for task in tasks]
        values = [v for score in scores for v in (score.linear, score.whitened_knn, score.knn)]
        cells.append([row.features, *(f"{100 * value:.1f} %" for value in values)])
    guesses = [f"{100 * probes.chance[task]:.1f} %" for task in tasks for _ in PROBES]
    return [*cells, ["always the commonest class", *guesses]]


def summary_text(report: RunReport, metrics: Sequence[Mapping[str, Any]], plotted: bool) -> str:
    """The run in Markdown."""
    recipe = report.recipe
    steps, batch = recipe.train.num_steps, recipe.train.batch_size
    epochs = steps * batch / report.images
    parts = [
        f"# {printable(report.folder.name)}",
        f"{steps:,} steps of {batch} images ({epochs:,.1f} passes over {report.images:,} images) "
        f"in {format_seconds(report.seconds)}, "
        f"{steps * batch / max(report.seconds, 1e-9):,.0f} images/s with the panels counted in.",
    ]
    if report.probes:
        header, *rows = probe_cells(Probes(report.chance, report.probes))
        parts += [
            f"## Accuracy on held-out images ({', '.join(report.chance)})",
            _markdown_table(header, rows),
            "The linear probe is a logistic regression on standardised features; kNN votes among "
            "20 neighbours by cosine, of features as they are and whitened by those it looks "
            "among. Features are averaged over the patches unless the row says otherwise. The "
            "commonest class is that of the images the probes are fitted on.",
        ]
    if report.no_probes:
        parts += ["## Accuracy on held-out images", f"Not measured: {report.no_probes}."]
    parts += _panel_section(metrics, recipe)
    if plotted:
        parts += ["## Curves", "![curves](curves.png)"]
    else:
        parts += ["## Masks", "![masks](masks.png)", PLOTS_NOTE + "."]
    parts += _incidents(report)
    parts += [
        "## Settings",
        f"`{recipe.name}`: all settings are in `checkpoints/*/checkpoint.json`.",
        _markdown_table(("setting", "value"), _main_settings(recipe)),
        "Versions: " + ", ".join(f"{name} {value}" for name, value in versions().items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _panel_section(metrics: Sequence[Mapping[str, Any]], recipe: Recipe) -> list[str]:
    panels = [line for line in metrics if "effective_rank" in line]
    losses = [line for line in metrics if "loss" in line]
    if not panels or not losses:
        return []
    first, last = panels[0], panels[-1]
    warnings = learning_warnings(last, recipe.model.width, recipe.schedule.warmup_steps)
    rows = [
        (title, f"{first[name]:.3g}", f"{last[name]:.3g}")
        for name, title in (
            ("effective_rank", "effective rank (RankMe)"),
            ("centred_rank", "effective rank, less the mean"),
            ("feature_std", "std over images, mean of the dimensions"),
            ("lowest_std", "std over images, lowest dimension"),
            ("cosine", "mean cosine between images"),
            ("knn", "online kNN accuracy"),
            ("knn_guessing", "accuracy of guessing on the same images"),
            ("r2", "R2: share predicted of what the position leaves open"),
            ("position_share", "share of the targets' variance: position"),
            ("image_share", "share of the targets' variance: image"),
            ("interaction_share", "share of the targets' variance: this patch of this image"),
            ("encoder_grad_norm", "gradient norm of the encoder"),
        )
        if name in first and name in last
    ]
    return [
        "## Target features",
        _markdown_table(("", f"step {first['step']}", f"step {last['step']}"), rows),
        f"Loss at the end {losses[-1]['loss']:.4f}. It is a proxy: it falls while targets are easy "
        "and rises again when they begin to carry content. A collapse shows here instead: "
        "effective rank towards 1, std towards 0, cosine towards 1.",
        *(f"**Warning:** {sentence}." for sentence in warnings.values()),
    ]


def _unreadable(report: RunReport) -> str:
    since = f" from step {report.first_step} on" if report.first_step else ""
    images = f"{report.unreadable_count:,} of {report.images:,} images"
    return f"{images} could not be read{since} and were replaced by others"


def _incidents(report: RunReport) -> list[str]:
    notes = []
    if report.skipped_steps:
        notes.append(f"{report.skipped_steps} updates were skipped (non-finite loss or gradients).")
    if report.unreadable_count:
        listing = "\n".join(f"- {name}" for name in report.unreadable)
        more = report.unreadable_count - len(report.unreadable)
        rest = f"\n- and {more:,} more" if more else ""
        notes.append(f"{_unreadable(report)}:\n\n{listing}{rest}")
    if report.left_out:
        listing = "\n".join(f"- {name}" for name in report.left_out[:20])
        notes.append(f"{len(report.left_out)} left out, being no readable files:\n\n{listing}")
    return ["## Incidents", *notes] if notes else []


def _main_settings(recipe: Recipe) -> list[tuple[str, str]]:
    model, schedule = recipe.model, recipe.schedule
    return [
        ("images", "x".join(map(str, model.image_size))),
        ("patches", "x".join(map(str, model.patch_size))),
        ("encoder", f"{model.width} wide, {model.depth} deep, {model.heads} heads"),
        (
            "predictor",
            f"{model.predictor_width} wide, {model.predictor_depth} deep, "
            f"{model.predictor_heads} heads",
        ),
        ("masks", f"{recipe.masks.strategy}, {recipe.masks.batching}"),
        ("loss", model.loss),
        ("learning rate", f"{schedule.peak_lr:g} after {schedule.warmup_steps} steps of warm-up"),
        ("weight decay", f"{schedule.weight_decay:g} to {schedule.final_weight_decay:g}"),
        ("momentum", f"{schedule.momentum:g} to {schedule.final_momentum:g}"),
        ("seed", str(recipe.train.seed)),
    ]


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
