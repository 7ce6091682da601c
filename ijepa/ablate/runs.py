"""The runs of a comparison: every variant under every seed, spread over processes.

    OUT/table-6/multi-block/seed-0/     a run's folder, as any other
    OUT/table-6/table.md  results.json  plot.png

A run is over when its closing table is written (probes.json). Started again, the same comparison
leaves those alone, goes on with what was stopped and begins the rest; a folder of other settings is
refused by name.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ijepa.ablate.tables import Comparison, Variant
from ijepa.config import Recipe
from ijepa.recipes import implied_settings, recipe_from_dict, recipe_to_dict, with_settings
from ijepa.report.probes import FILE_NAME as PROBES
from ijepa.train.checkpoint import find_checkpoint, holds_checkpoint, read_metadata
from ijepa.train.pretrain import pretrain
from ijepa.train.resume import RESUMABLE, by_name, load_to_resume

LOG = "log.txt"


@dataclass(frozen=True)
class PlannedRun:
    """One run: which variant and seed, its recipe and its folder."""

    variant: Variant
    seed: int
    recipe: Recipe
    folder: Path

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.variant.name}, seed {self.seed}"

    @property
    def over(self) -> bool:
        """Whether its closing table is there."""
        return (self.folder / PROBES).exists()


def plan_runs(
    comparison: Comparison,
    base: Recipe,
    out: Path,
    seeds: Sequence[int],
    changes: Mapping[str, Any] | None = None,
) -> list[PlannedRun]:
    """All runs, seed by seed, so that a comparison that is cut short has whole seeds.

    Args:
        base: settings of all runs.
        changes: further settings of all runs; they win over the comparison's own.

    Raises:
        ValueError: settings that no run could have, or runs without closing probes.
    """
    changes = dict(changes or {})
    folders = {variant.name: _slug(variant.name) for variant in comparison.variants}
    if len(set(folders.values())) < len(comparison.variants):
        folders = {
            variant.name: f"{number:03d}-{_slug(variant.name)}"
            for number, variant in enumerate(comparison.variants)
        }
    planned = []
    for seed in seeds:
        for variant in comparison.variants:
            folder = out / comparison.name / folders[variant.name] / f"seed-{seed}"
            settings = {**comparison.common, **variant.settings, **changes}
            settings |= implied_settings(settings)
            settings |= {"train.seed": seed, "train.output": str(folder)}
            try:
                recipe = with_settings(base, settings)
            except ValueError as error:
                raise ValueError(f"{variant.name}: {error}") from None
            planned.append(PlannedRun(variant, seed, recipe, folder))
    if not all(run.recipe.monitor.evaluate for run in planned):
        raise ValueError("the runs are compared by their closing probes: leave monitor.evaluate on")
    return planned


def do_runs(
    planned: Sequence[PlannedRun], processes: int, console: Console, limit: int | None = None
) -> list[str]:
    """Do what is not over yet, `processes` at a time, each on its share of the cores.

    Args:
        limit: runs to do now, at most.

    Returns:
        What failed, as "name: reason"; the others are done all the same.

    Raises:
        KeyboardInterrupt: a signal stopped a run, which has saved.
    """
    left = [run for run in planned if not run.over]
    if len(left) < len(planned):
        console.print(f"{len(planned) - len(left)} of {len(planned)} runs are over already")
    left = left[:limit]
    threads = max((os.cpu_count() or 1) // processes, 1)
    failed: list[str] = []
    for done, (run, error) in enumerate(_results(left, processes, threads), start=1):
        if error is not None:
            failed.append(f"{run.name}: {error}")
        outcome = "failed" if error is not None else "over" if run.over else "stopped"
        text = f"{done} of {len(left)}: {run.name} {outcome}"
        console.print(text, highlight=False, markup=False)
        if outcome == "stopped":  # by a signal, which means all of them
            raise KeyboardInterrupt
    return failed


def check_same(run: PlannedRun) -> None:
    """Raise ValueError where the folder holds a run of other settings."""
    if not holds_checkpoint(run.folder):
        return
    metadata = read_metadata(find_checkpoint(run.folder))
    saved = by_name(recipe_from_dict(metadata["config"], str(run.folder)))
    wanted = by_name(run.recipe.in_steps(metadata["data"]["images"]))
    for key in sorted(wanted, key=lambda key: key != "train.steps"):  # others follow from it
        value = wanted[key]
        if value != saved[key] and (key not in RESUMABLE or key == "train.steps"):
            raise ValueError(
                f"{run.folder} holds a run with {key} {saved[key]}, not {value}: choose another "
                "--out, or give the settings of before"
            )


def _results(
    left: Sequence[PlannedRun], processes: int, threads: int
) -> Iterator[tuple[PlannedRun, str | None]]:
    """(run, why it failed) as they come to an end."""
    if processes == 1:
        for run in left:
            yield run, _one_run(recipe_to_dict(run.recipe), str(run.folder), None)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        waiting: dict[Future, PlannedRun] = {
            pool.submit(_one_run, recipe_to_dict(run.recipe), str(run.folder), threads): run
            for run in left
        }
        try:
            while waiting:
                over, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in over:
                    failure = future.exception()
                    yield waiting.pop(future), future.result() if failure is None else str(failure)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _one_run(settings: dict[str, Any], folder: str, threads: int | None) -> str | None:
    """Begin a run or go on with it; why it failed, None where it did not. Its output goes into a
    file beside the run."""
    if threads is not None:
        torch.set_num_threads(threads)
    recipe, path = recipe_from_dict(settings), Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    with (path / LOG).open("a", encoding="utf-8", errors="backslashreplace") as log:
        console = Console(file=log, width=120)
        try:
            checkpoint = load_to_resume(path) if holds_checkpoint(path) else None
            pretrain(recipe, checkpoint=checkpoint, console=console)
        except (ValueError, OSError, RuntimeError) as error:
            console.print(f"{type(error).__name__}: {error}", markup=False)
            return str(error)
    return None


def _slug(name: str) -> str:
    """A folder's name: letters, digits, dots and dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "variant"
