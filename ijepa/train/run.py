"""A run: its recipe, data, networks and folder, put together and taken down again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
from rich.console import Console
from torch import Tensor

from ijepa.config import Recipe
from ijepa.cost.here import images_per_second_at_peak, smaller_run
from ijepa.data import TrainingBatch, build_loader
from ijepa.masks.batch import MaskBatch
from ijepa.masks.capacities import plan_capacities
from ijepa.masks.from_config import build_mask_sampler
from ijepa.report.metrics import MetricsWriter
from ijepa.report.progress import RunProgress, telling
from ijepa.train import distributed, from_recipe
from ijepa.train.checkpoint import Checkpoint
from ijepa.train.divergence import TooManySkips, WeightsNotFinite
from ijepa.train.figures import Figures
from ijepa.train.online import OnlineProbes
from ijepa.train.panel import RunPanel
from ijepa.train.prefetch import copied_beside
from ijepa.train.resume import by_name, check_resumable, run_folder_of
from ijepa.train.run_folder import RunFolder
from ijepa.train.saving import Saving, restore
from ijepa.train.trainer import LateResult, Trainer

# What may differ between machines: where things are there.
_OF_EACH_RANK = ("data.path", "data.workers", "train.output")


def _of_all_ranks(recipe: Recipe, checkpoint: Checkpoint | None) -> dict[str, object]:
    """What a rank must have in common with the others, by name."""
    settings = {key: value for key, value in by_name(recipe).items() if key not in _OF_EACH_RANK}
    if checkpoint is not None:
        settings["the checkpoint's step"] = checkpoint.step
        settings["the checkpoint's checksum"] = checkpoint.metadata.get("checksum")
    return settings


class Run:
    """Everything `train` works with.

    Args:
        recipe: settings; lengths may still be in epochs.
        checkpoint: where to go on, None to begin.
        console: None for ranks that do not talk.

    Attributes:
        recipe: settings, lengths in steps.
        folder, source, model, trainer, loader: what the run works with.
        progress, figures, panel, saving: what happens between its steps.
        left_out: FIFOs, sockets and devices among the images.
        unwritten_report: why the report is missing, None where it is not.

    Raises:
        ValueError: settings, data or checkpoint that do not fit together.
    """

    def __init__(
        self,
        recipe: Recipe,
        checkpoint: Checkpoint | None,
        device: torch.device,
        console: Console | None,
    ):
        self.device, self.console = device, console
        distributed.require_same(_of_all_ranks(recipe, checkpoint))
        folder = None
        if checkpoint is not None:
            check_resumable(checkpoint, recipe)
            folder = RunFolder(run_folder_of(checkpoint.path))
        ranks = distributed.world_size()
        micro_batch = recipe.micro_batch_size(ranks)
        sampler = build_mask_sampler(recipe.masks, recipe.model.grid, micro_batch, device)
        if recipe.data.source == "folder":
            recipe.check_length()
        else:
            recipe.in_steps(recipe.data.num_images)  # before any of them is rendered
        source = from_recipe.open_source(recipe, console)
        self.recipe = recipe = recipe.in_steps(len(source))
        self.source = source
        data_id = {"source": recipe.data.source, **from_recipe.data_fingerprint(source)}
        distributed.require_same({f"the data's {key}": value for key, value in data_id.items()})
        self.model = from_recipe.build_model(recipe).to(device)
        compiled = from_recipe.compiles(recipe, device)
        if compiled and device.type == "cpu":  # one traced graph a shape
            sampler.capacities = plan_capacities(sampler, micro_batch)
        self.trainer = Trainer(
            self.model,
            recipe.optim,
            recipe.schedule,
            precision=recipe.train.precision,
            target_precision=recipe.train.target_precision,
            compile=compiled,
            cuda_graph=recipe.train.cuda_graph,
            parallel=from_recipe.chosen_parallel(recipe, device),
        )
        self.first_step, self._seconds_before = 0, 0.0
        if checkpoint is not None:
            restore(
                checkpoint,
                self.trainer,
                data_id=data_id,
                last_step=recipe.train.num_steps,
            )
            self.first_step = checkpoint.step
            self._seconds_before = float(checkpoint.metadata.get("seconds", 0.0))
        self._started = time.perf_counter()
        self.loader = build_loader(
            source,
            sampler,
            from_recipe.training_transform(recipe),
            batch_size=micro_batch,
            seed=recipe.train.seed,
            start_step=self.first_step,
            end_step=recipe.train.num_steps,
            num_workers=recipe.data.workers,
            rank=distributed.rank(),
            world_size=ranks,
            accumulate=recipe.train.accumulate,
            pin_memory=device.type == "cuda",
        )
        self.progress = RunProgress(
            console,
            recipe.train.num_steps,
            self.first_step,
            recipe.train.batch_size,
            images_per_second_at_peak=images_per_second_at_peak(recipe, device, ranks),
            first_is_slow=bool(compiled),
            smaller=smaller_run(recipe, device),
        )
        self.left_out: tuple[str, ...] = getattr(source, "left_out", ())
        self._tell_of_the_images()
        # Last, so that what fails before leaves no folder behind.
        self.folder = RunFolder.begun(recipe) if folder is None else folder
        self._metrics: MetricsWriter | None = None
        try:
            if distributed.is_main():
                self._metrics = MetricsWriter(
                    self.folder.path, self.first_step, recipe.train.tensorboard
                )
        except BaseException:
            self._close_folder()
            raise
        self.figures = Figures(recipe, self.trainer, self.progress, self._metrics)
        self.panel = RunPanel(
            recipe,
            source,
            figures=self.figures,
            progress=self.progress,
            console=console,
        )
        self._online = OnlineProbes(
            recipe, source, figures=self.figures, progress=self.progress
        )
        self.saving = Saving(
            recipe,
            self.trainer,
            self.folder,
            metrics=self._metrics,
            progress=self.progress,
            data_id=data_id,
            seconds=self.seconds,
            saved_step=None if checkpoint is None else checkpoint.step,
        )
        self.unwritten_report: OSError | None = None

    def _tell_of_the_images(self) -> None:
        if self.recipe.data.source == "folder":
            self.progress.note(f"{len(self.source):,} images in {self.recipe.data.path}")
        if self.left_out:
            named = ", ".join(self.left_out[:5]) + (", ..." if len(self.left_out) > 5 else "")
            self.progress.note(f"Left out, being no readable files: {len(self.left_out)} ({named})")
        if self.recipe.monitor.every and len(self.source) < 2:
            self.progress.note("No collapse panel: it compares images, and there is one alone")

    def look(self, done: int) -> None:
        """Panel and online probes after `done` steps; the best weights so far are kept.

        By the first rank; all have to ask, for a sharded model is put together.
        """
        self.saving.finish()
        model = self.trainer.whole_model(distributed.is_main())
        if model is None or not distributed.is_main():
            return
        panel = self.panel.look(done, model)
        score = self._online.look(done, panel, model)
        if score is not None and done > 0:
            weights = model.state_dict() if self.trainer.sharded else self.trainer.weights()
            self.saving.keep_if_best(done, score, weights)

    def first(self, what: str, done: int) -> contextlib.AbstractContextManager[None]:
        """Around the first step of this process: says what goes on where it takes a while."""
        quick = done > self.first_step + 1
        return contextlib.nullcontext() if quick else telling(self.console, what)

    def batches(self) -> Iterator[tuple[int, list[Tensor], list[MaskBatch]]]:
        """(steps done after it, micro-batches of images, their masks), on the device."""
        images: list[Tensor] = []
        masks: list[MaskBatch] = []
        done, accumulate = self.first_step, self.recipe.train.accumulate
        pairs = ((batch.images, batch.masks) for batch in self._loaded())
        for part, part_masks in copied_beside(pairs, self.device):
            images.append(part)
            masks.append(part_masks)
            if len(images) == accumulate:
                done += 1
                yield done, images, masks
                images, masks = [], []

    def _loaded(self) -> Iterator[TrainingBatch]:
        batches = iter(self.loader)
        with telling(self.console, "Reading the first batch"):
            first = next(batches, None)
        if first is not None:
            yield first
            yield from batches

    def rescue(self, late: LateResult | None) -> None:
        """After a failure: log and save the last whole step. The failure goes on to its catcher."""
        done = self.trainer.step_index
        if self.trainer.updating or done == 0:
            return
        with contextlib.suppress(TooManySkips, WeightsNotFinite):  # the failure may be one of them
            self.figures.observe(late)
            if self.trainer.sharded:
                self.saving.tell_unsaved(done)
            elif not self.trainer.consecutive_skips:
                self.saving.save(done)

    def check_written(self) -> None:
        """Raise OSError where the last checkpoint, the report or lines of the log are missing."""
        unwritten = self.saving.unwritten or self.unwritten_report
        if self._metrics is not None:
            self._metrics.close()
            unwritten = unwritten or self._metrics.failure
        if unwritten is not None:
            raise unwritten

    def seconds(self) -> float:
        """Time spent training, over all parts of a resumed run."""
        return self._seconds_before + time.perf_counter() - self._started

    def close(self) -> None:
        """Close the files and let others train into the folder; without a step it goes away."""
        self.saving.close()
        if self._metrics is not None:
            self._metrics.close()
        self._close_folder()

    def _close_folder(self) -> None:
        self.folder.close(nothing_done=self.trainer.step_index == 0)
