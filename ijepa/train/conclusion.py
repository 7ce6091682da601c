"""The end of a run that took all its steps: pictures and summary, then the closing probes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from ijepa.evaluate.closing import closing_table
from ijepa.evaluate.images import ProbesNotFitted
from ijepa.masks.from_config import build_mask_sampler
from ijepa.model import IJEPA
from ijepa.report.summary import (
    RunReport,
    show_files,
    show_incidents,
    show_probes,
    write_report,
    write_summary,
)
from ijepa.train import distributed, from_recipe
from ijepa.visualize import draw_mask_examples

if TYPE_CHECKING:
    from ijepa.train.run import Run

_EXAMPLES = 8  # images that the masks are drawn on


def conclude(run: Run) -> None:
    """Report and probes, by the first rank.

    In this order: whatever becomes of the probes, what the run did is written down. What of it
    finds no room is told at the end, by `Run.check_written`.
    """
    model = run.trainer.whole_model(distributed.is_main())
    if model is None or not distributed.is_main():
        return
    report = RunReport(
        folder=run.folder.path,
        recipe=run.recipe,
        images=len(run.source),
        seconds=run.seconds(),
        skipped_steps=int(run.trainer.total_skips),
        unreadable=run.loader.unreadable.names,
        unreadable_count=run.loader.unreadable.count,
        first_step=run.first_step,
        left_out=run.left_out,
    )
    with _noting_what_is_unwritten(run):
        write_report(report, _mask_examples(run))
    if run.recipe.monitor.evaluate and run.source.labels:
        report = _probed(run, report, model)
        with _noting_what_is_unwritten(run):
            write_summary(report)
    if run.console is not None:
        show_incidents(report, run.console)
        show_probes(report, run.console)
        if run.saving.unwritten is None and run.unwritten_report is None:
            show_files(report, run.console)


def _probed(run: Run, report: RunReport, model: IJEPA) -> RunReport:
    """The report with the closing probes, or with why there are none."""
    try:
        images = from_recipe.labelled_images(run.recipe, run.source, run.console is not None)
    except ProbesNotFitted as error:
        return dataclasses.replace(report, no_probes=str(error))
    run.progress.note("Fitting probes on the target encoder and the baselines ...")
    untrained = from_recipe.build_model(run.recipe).to(run.device)
    probes = closing_table(model, untrained, images)
    return dataclasses.replace(report, chance=images.chance, probes=probes)


@contextlib.contextmanager
def _noting_what_is_unwritten(run: Run) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        run.unwritten_report = run.unwritten_report or error


def _mask_examples(run: Run) -> np.ndarray:
    """(H, W, 3) uint8 picture of fresh masks on the first of the panel's images."""
    images = run.panel.images()[0][:_EXAMPLES]
    sampler = build_mask_sampler(
        run.recipe.masks, run.recipe.model.grid, len(images), torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(run.recipe.train.seed)
    return draw_mask_examples(images, sampler(len(images), generator=generator))
