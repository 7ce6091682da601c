"""A comparison from its plan to its table."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ijepa.ablate.options import ManyRuns
from ijepa.ablate.results import carries_over, cells, gather, write_results
from ijepa.ablate.runs import PlannedRun, do_runs, plan_runs
from ijepa.ablate.tables import Comparison
from ijepa.config import Recipe
from ijepa.report.console import RunConsole


def compare(
    comparison: Comparison, base: Recipe, changes: dict[str, Any], options: ManyRuns
) -> int:
    """Do the runs that are not over, then show and write what all of them found.

    Returns:
        The exit status: 1 where a run failed; the table is of the others.

    Raises:
        ValueError: settings that no run could have.
    """
    console = RunConsole()
    planned = plan_runs(comparison, base, options.out, range(options.seeds), changes)
    if options.dry_run:
        for run in planned:
            state = "over" if run.over else "to do"
            console.print(f"{state}: {run.name}: {run.folder}", highlight=False, markup=False)
        return 0
    failed: list[str] = []
    try:
        failed = do_runs(planned, options.processes, console, options.limit)
    finally:  # what is over is shown, also where the rest was interrupted
        rows = gather(comparison, planned, options.task)
        table = Table(title=comparison.title, title_justify="left")
        header, *lines = cells(rows)
        for number, name in enumerate(header):
            table.add_column(name, justify="right" if number else "left")
        for line in lines:
            table.add_row(*line)
        console.print(table)
        for sentence in carries_over(rows):
            console.print(sentence, highlight=False, markup=False, soft_wrap=True)
        folder = options.out / comparison.name
        for path in write_results(comparison, rows, folder, about(planned)):
            console.print(str(path), highlight=False, markup=False, soft_wrap=True)
    for failure in failed:
        console.print(f"failed: {failure}", highlight=False, markup=False, soft_wrap=True)
    return 1 if failed else 0


def about(planned: list[PlannedRun]) -> str:
    """What the runs were, in a sentence."""
    recipe = planned[0].recipe
    length = (
        f"{recipe.train.steps:,} steps"
        if recipe.train.steps is not None
        else f"{recipe.train.epochs:g} epochs"
    )
    return (
        f"Runs of recipe `{recipe.name}`: {length} of {recipe.train.batch_size} images of "
        f"{recipe.data.source}, an encoder {recipe.model.width} wide and {recipe.model.depth} deep."
    )
