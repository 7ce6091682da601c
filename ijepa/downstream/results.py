"""What an evaluation found: a table for people, a JSON file for programs."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ijepa.disk import write_whole
from ijepa.evaluate.confidence import wilson_interval
from ijepa.versions import versions


@dataclass(frozen=True)
class Figure:
    """An accuracy in [0, 1]: the mean of `draws`, where labels were drawn more than once."""

    what: str
    accuracy: float
    draws: tuple[float, ...] = ()


@dataclass(frozen=True)
class Result:
    """An evaluation: what of, on what, how, and what came out.

    Attributes:
        protocol: "knn", "linear", "lowshot" or "finetune".
        source, encoder: where the encoder came from, and its fingerprint.
        train_images, test_images, classes: of the task.
        chance: accuracy of always guessing the commonest training class.
        figures: every one that was found.
        settings: whatever else decided about them.
    """

    protocol: str
    task: str
    source: str
    encoder: str
    train_images: int
    test_images: int
    classes: int
    chance: float
    figures: tuple[Figure, ...]
    settings: dict[str, Any]

    @property
    def best(self) -> Figure:
        """The highest accuracy; of equal ones the first."""
        return max(self.figures, key=lambda figure: figure.accuracy)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the best, by the number of test images alone."""
        return wilson_interval(self.best.accuracy, self.test_images)


def show_result(result: Result, console: Console) -> None:
    """Print every figure, and the best with its interval."""
    table = Table(
        title=f"{result.protocol} on {result.task}: {result.source}", title_justify="left"
    )
    table.add_column(f"{result.test_images:,} test images, {result.classes} classes")
    table.add_column("accuracy", justify="right")
    for figure in result.figures:
        spread = f" ± {100 * np.std(figure.draws):.1f}" if len(figure.draws) > 1 else ""
        table.add_row(figure.what, f"{100 * figure.accuracy:.1f}{spread} %")
    table.add_row("always the commonest class", f"{100 * result.chance:.1f} %")
    console.print(table)
    low, high = result.interval
    several = f" of {len(result.figures)}, chosen on the test images" if result.figures[1:] else ""
    console.print(
        f"best{several}: {result.best.what}: {100 * result.best.accuracy:.2f} % "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f})",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def write_result(result: Result, path: Path) -> None:
    """Write it as JSON.

    Raises:
        NotWritten: the file could not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    described = {
        **dataclasses.asdict(result),
        "best": dataclasses.asdict(result.best),
        "interval_95": result.interval,
        "versions": versions(),
    }
    write_whole(path, json.dumps(described, indent=1) + "\n")
