"""A run: its folder, networks, data, and what happens between the steps."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor

from ijepa.config import Recipe
from ijepa.cost.plan import flops_per_image, known_gpu
from ijepa.data import TrainingBatch, build_loader
from ijepa.disk import write_whole
from ijepa.evaluate.closing import ProbesNotFitted, closing_table
from ijepa.evaluate.collapse import collapse_panel, panel_line
from ijepa.evaluate.features import encoder_features
from ijepa.masks.batch import MaskBatch
from ijepa.masks.capacities import plan_capacities
from ijepa.masks.from_config import build_mask_sampler
from ijepa.recipes import recipe_to_dict
from ijepa.report.metrics import MetricsWriter
from ijepa.report.progress import RunProgress, telling
from ijepa.report.summary import (
    RunReport,
    show_files,
    show_incidents,
    show_probes,
    write_report,
    write_summary,
)
from ijepa.train import distributed, from_recipe
from ijepa.train.checkpoint import (
    METADATA,
    Checkpoint,
    CheckpointError,
    holds_checkpoint,
    save_checkpoint,
)
from ijepa.train.divergence import TooManySkips, WeightsNotFinite, check_finite
from ijepa.train.prefetch import copied_beside
from ijepa.train.resume import run_folder_of
from ijepa.train.run_folder import RECIPE, check_unused, new_run_folder, put_back, take_away
from ijepa.train.run_lock import RunLock
from ijepa.train.trainer import StepResult, Trainer
from ijepa.visualize import draw_mask_examples

_EXAMPLES = 8  # images that the masks are drawn on


class LateResult:
    """A step's figures on their way to the host, to be read while the next step runs."""

    def __init__(self, done: int, result: StepResult):
        self.done, self.result = done, result
        figures = (result.loss, result.grad_norm, result.skipped, result.consecutive_skips)
        self._host = torch.stack([figure.double() for figure in figures]).to(
            "cpu", non_blocking=True
        )
        self._copied = None
        if result.loss.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> tuple[float, float, bool, int]:
        """(loss, gradient norm, skipped, skipped steps in a row)."""
        if self._copied is not None:
            self._copied.synchronize()
        loss, grad_norm, skipped, in_a_row = self._host.tolist()
        return loss, grad_norm, bool(skipped), int(in_a_row)


class Run:
    """Everything `train` works with.

    Args:
        recipe: settings; lengths may still be in epochs.
        checkpoint: where to go on, None to begin.
        console: None for ranks that do not talk.

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
        self.lock: RunLock | None = None
        if checkpoint is not None:
            self._lock(run_folder_of(checkpoint.path))
        micro_batch = from_recipe.micro_batch_size(recipe)
        sampler = build_mask_sampler(recipe.masks, recipe.model.grid, micro_batch, device)
        if recipe.data.source == "folder":
            recipe.check_length()
        else:
            recipe.in_steps(recipe.data.num_images)  # before any of them is rendered
        source = from_recipe.open_source(recipe, console)
        self.recipe = recipe = recipe.in_steps(len(source))
        self.source = source
        self.data_id = {"source": recipe.data.source, **from_recipe.data_fingerprint(source)}
        self.model = from_recipe.build_model(recipe).to(device)
        compiled = compiles(recipe, device)
        if compiled and device.type == "cpu":  # one traced graph a shape
            sampler.capacities = plan_capacities(sampler, micro_batch)
        self.trainer = Trainer(
            self.model,
            recipe.optim,
            recipe.schedule,
            precision=recipe.train.precision,
            compile=compiled,
            cuda_graph=recipe.train.cuda_graph,
        )
        self._compilations_noted = 0
        self.first_step, self.seconds_before = 0, 0.0
        self._saved_step: int | None = None
        self._save_put_off = False
        self.unwritten: OSError | None = None  # why the latest save, or the report, is missing
        if checkpoint is not None:
            self._restore(checkpoint)
        self.started = time.perf_counter()
        self.loader = build_loader(
            source,
            sampler,
            from_recipe.training_transform(recipe),
            batch_size=micro_batch,
            seed=recipe.train.seed,
            start_step=self.first_step,
            end_step=recipe.train.steps,
            num_workers=recipe.data.workers,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            accumulate=recipe.train.accumulate,
            pin_memory=device.type == "cuda",
        )
        self._metrics_failing = False
        self.progress = RunProgress(
            console,
            recipe.train.steps,
            self.first_step,
            recipe.train.batch_size,
            images_per_second_at_peak=images_per_second_at_peak(recipe, device),
            first_is_slow=compiled,
            smaller=smaller_run(recipe, device),
        )
        if recipe.data.source == "folder":
            self.progress.note(f"{len(source):,} images in {recipe.data.path}")
        self._left_out: tuple[str, ...] = getattr(source, "left_out", ())
        if self._left_out:
            named = ", ".join(self._left_out[:5]) + (", ..." if len(self._left_out) > 5 else "")
            self.progress.note(f"Left out, being no files: {len(self._left_out)} ({named})")
        if recipe.monitor.every and len(source) < 2:
            self.progress.note("No collapse panel: it compares images, and there is one alone")
        self._panel_images: tuple[Tensor, Tensor | None] | None = None
        # Last, so that what fails before leaves no folder behind.
        self._begins = checkpoint is None
        self._folder_was_there = (
            recipe.train.output is not None and Path(recipe.train.output).exists()
        )
        self.folder = self._open_folder(checkpoint)
        try:
            self.metrics = self._open_metrics()
        except BaseException:
            self.metrics = None
            self.close()
            raise

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

    def observe(self, late: LateResult | None) -> None:
        """Show and write down the figures of a step that is over.

        Raises:
            TooManySkips: naming the step where it began.
        """
        if late is None:
            return
        loss, grad_norm, skipped, in_a_row = late.read()
        done, result, train = late.done, late.result, self.recipe.train
        self.progress.update(done, loss, result.lr)
        for seconds in list(self.trainer.compilations.values())[self._compilations_noted :]:
            self._compilations_noted += 1
            self.progress.note(
                f"step {done}: compiled for shapes {self._compilations_noted} in {seconds:.0f} s"
            )
        if skipped:
            self.progress.note(f"step {done}: loss {loss}, gradient norm {grad_norm}: not finite, "
                               "update skipped")  # fmt: skip
        if done % train.log_every == 0 or done in (1, train.steps) or skipped:
            finite = {"loss": loss, "grad_norm": grad_norm} if not skipped else {}
            self._write(
                done,
                **finite,
                lr=result.lr,
                weight_decay=result.weight_decay,
                momentum=result.momentum,
                images_per_second=round(self.progress.images_per_second, 1),
                skipped=int(skipped),
            )
        if in_a_row > self.recipe.optim.max_skipped_steps:
            first = done - in_a_row + 1
            raise TooManySkips(
                f"loss or gradients were not finite for {in_a_row} steps in a row, from step "
                f"{first} on. Nothing was saved since. Start again with a lower "
                "schedule.peak_lr, optim.max_grad_norm, or train.precision fp32",
                good_before=first - 1,  # the weights after that step are what this began with
            )

    def due(self, every: int, done: int) -> bool:
        """Whether something that happens every so many steps, and at the end, is; 0 is never."""
        return every > 0 and (done % every == 0 or done == self.recipe.train.steps)

    def look(self, done: int) -> None:
        """The collapse panel, on the first rank."""
        if not distributed.is_main():
            return
        with telling(self.console, f"Panel on {self.recipe.monitor.images:,} images"):
            self._look(done)

    def _look(self, done: int) -> None:
        images, labels = self._fixed_images()
        if images.shape[0] < 2:
            return  # nothing to compare; said at the start
        features = encoder_features(self.model.target_encoder, images).last
        panel = collapse_panel(features, labels)
        self._write(done, **dataclasses.asdict(panel))
        self.progress.note(panel_line(done, panel))

    def save_due(self, done: int) -> bool:
        """Whether it is time for a checkpoint.

        While updates are skipped it is put off until one is made again: checkpoints of weights that
        train no further would soon have pushed out the last good ones.
        """
        if not (self._save_put_off or self.due(self.recipe.train.checkpoint_every, done)):
            return False
        skipping = bool(self.trainer.consecutive_skips) and done < self.recipe.train.steps
        if skipping and not self._save_put_off:
            self.progress.note(f"step {done}: not saved before there are updates again")
        self._save_put_off = skipping
        return not skipping

    def save(self, done: int) -> None:
        """A checkpoint after `done` steps, by the first rank, once the log is on the disk.

        Where there is no room it says so and training goes on: the next save tries again.

        Raises:
            WeightsNotFinite: nothing was written.
        """
        if not distributed.is_main() or done == self._saved_step:
            return
        weights = self.trainer.weights()
        check_finite(weights, done)
        try:
            self._put_folder_back()
            self.metrics.sync()
            save_checkpoint(
                self.folder,
                done,
                weights=weights,
                state={"trainer": self.trainer.state_dict(), "random": random_states()},
                metadata={
                    "config": recipe_to_dict(self.recipe),
                    "data": {**self.data_id, "next_step": done},
                    "seconds": self.seconds(),
                },
            )
        except OSError as error:
            self.unwritten = error
            self.progress.note(f"step {done}: NOT SAVED, the next save will try again: {error}")
        else:
            self.unwritten, self._saved_step = None, done

    def _put_folder_back(self) -> None:
        lock = put_back(self.folder, self._settings(), self.metrics, self.lock)
        if lock is not None:
            self.lock = lock
            self.progress.note(f"{self.folder} was deleted while the run goes on: it is back, with "
                               "recipe.json and metrics.jsonl")  # fmt: skip

    def _settings(self) -> str:
        """The content of recipe.json."""
        return json.dumps(recipe_to_dict(self.recipe), indent=1)

    def saved(self) -> str | None:
        """What there is to go on from, as "step 500"; None before the first checkpoint."""
        return None if self._saved_step is None else f"step {self._saved_step}"

    def rescue(self, late: LateResult | None) -> None:
        """After a failure: log and save the last whole step. The failure goes on to its catcher."""
        done = self.trainer.step_index
        if self.trainer.updating or done == 0:
            return
        with contextlib.suppress(TooManySkips, WeightsNotFinite):  # the failure may be one of them
            self.observe(late)
            if not self.trainer.consecutive_skips:
                self.save(done)

    def check_written(self) -> None:
        """Raise OSError where the last checkpoint, the report or lines of the log are missing."""
        if self.metrics is not None:
            self.metrics.close()
            self.unwritten = self.unwritten or self.metrics.failure
        if self.unwritten is None:
            return
        raise self.unwritten

    def conclude(self) -> None:
        """Pictures and summary, then the closing probes, by the first rank.

        In this order: whatever becomes of the probes, what the run did is written down.
        """
        if not distributed.is_main():
            return
        report = RunReport(
            folder=self.folder,
            recipe=self.recipe,
            images=len(self.source),
            seconds=self.seconds(),
            skipped_steps=int(self.trainer.total_skips),
            unreadable=self.loader.unreadable.names,
            unreadable_count=self.loader.unreadable.count,
            first_step=self.first_step,
            left_out=self._left_out,
        )
        with self._noting_what_is_unwritten():
            write_report(report, self._mask_examples())
        if self.recipe.monitor.evaluate and self.source.labels:
            report = self._probed(report)
            with self._noting_what_is_unwritten():
                write_summary(report)
        if self.console is not None:
            show_incidents(report, self.console)
            show_probes(report, self.console)
            if self.unwritten is None:
                show_files(report, self.console)

    def _probed(self, report: RunReport) -> RunReport:
        """The report with the closing probes, or with why there are none."""
        try:
            images = from_recipe.labelled_images(self.recipe, self.source, self.console is not None)
        except ProbesNotFitted as error:
            return dataclasses.replace(report, no_probes=str(error))
        self.progress.note("Fitting probes on the target encoder and the baselines ...")
        untrained = from_recipe.build_model(self.recipe).to(self.device)
        probes = closing_table(self.model, untrained, images)
        return dataclasses.replace(report, chance=images.chance, probes=probes)

    @contextlib.contextmanager
    def _noting_what_is_unwritten(self) -> Iterator[None]:
        """What of the report finds no room is told at the end, by `check_written`."""
        try:
            yield
        except OSError as error:
            self.unwritten = self.unwritten or error

    def seconds(self) -> float:
        """Time spent training, over all parts of a resumed run."""
        return self.seconds_before + time.perf_counter() - self.started

    def close(self) -> None:
        """Close the files and let others train into the folder; without a step it goes away."""
        if self.metrics is not None:
            self.metrics.close()
        nothing_done = self._begins and self.trainer.step_index == 0
        if distributed.is_main() and nothing_done and not holds_checkpoint(self.folder):
            take_away(self.folder, keep_itself=self._folder_was_there)
        if self.lock is not None:
            self.lock.release()

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Weights, optimiser, counters and random states of a checkpoint."""
        self._check_data(checkpoint)
        try:
            self.model.load_state_dict(checkpoint.weights)
            self.trainer.load_state_dict(checkpoint.state["trainer"])
            set_random_states(checkpoint.state["random"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{checkpoint.path} does not fit this run: {error}") from None
        self.first_step = self._saved_step = checkpoint.step
        if distributed.is_main():
            os.utime(checkpoint.path / METADATA)  # the newest of the run, whatever its step
        self.seconds_before = float(checkpoint.metadata.get("seconds", 0.0))
        if self.trainer.step_index != checkpoint.step:
            raise CheckpointError(
                f"{checkpoint.path} is of step {checkpoint.step}, but its optimiser of step "
                f"{self.trainer.step_index}"
            )
        if self.first_step > self.recipe.train.steps:
            raise CheckpointError(
                f"{checkpoint.path} is of step {checkpoint.step}, beyond train.steps "
                f"{self.recipe.train.steps}"
            )

    def _check_data(self, checkpoint: Checkpoint) -> None:
        saved = checkpoint.metadata.get("data", {})
        for name, value in self.data_id.items():
            if saved.get(name) != value:
                raise CheckpointError(
                    f"{checkpoint.path} was trained on other data: {name} is "
                    f"{saved.get(name)!r} there and {value!r} here"
                )

    def _lock(self, folder: Path) -> None:
        """Keep other processes out of the run's folder; refused on all ranks where one is in."""

        def lock() -> None:
            self.lock = RunLock(folder)

        distributed.on_main(lock)

    def _open_folder(self, checkpoint: Checkpoint | None) -> Path:
        """The folder of the run, the same on all ranks."""
        if checkpoint is not None:
            return run_folder_of(checkpoint.path)
        folder = Path(distributed.on_main(lambda: str(new_run_folder(self.recipe))))
        self._lock(folder)
        if distributed.is_main():
            check_unused(folder)  # again: somebody else's run may have ended since
            write_whole(folder / RECIPE, self._settings())
        return folder

    def _open_metrics(self) -> MetricsWriter | None:
        if not distributed.is_main():
            return None
        return MetricsWriter(self.folder, self.first_step, self.recipe.train.tensorboard)

    def _write(self, done: int, **values) -> None:
        if self.metrics is not None:
            self.metrics.write(done, values)
            failure = self.metrics.failure or self.metrics.events_failure
            if failure is not None and not self._metrics_failing:
                self.progress.note(f"step {done}: {failure}")
            self._metrics_failing = failure is not None

    def _fixed_images(self) -> tuple[Tensor, Tensor | None]:
        """The panel's images and the labels of the first task, read once."""
        if self._panel_images is None:
            view = from_recipe.viewing_transform(self.recipe)
            count = self.recipe.monitor.images
            images, labels = from_recipe.load_subset(self.source, view, count)
            self._panel_images = images, next(iter(labels.values()), None)
        return self._panel_images

    def _mask_examples(self):
        """(H, W, 3) uint8 picture of fresh masks on the first of the panel's images."""
        images = self._fixed_images()[0][:_EXAMPLES]
        sampler = build_mask_sampler(
            self.recipe.masks, self.recipe.model.grid, len(images), torch.device("cpu")
        )
        generator = torch.Generator().manual_seed(self.recipe.train.seed)
        return draw_mask_examples(images, sampler(len(images), generator=generator))


def compiles(recipe: Recipe, device: torch.device) -> bool | Literal["blocks"]:
    """What of the step is to be compiled: all of it on a GPU unless told otherwise."""
    if recipe.train.compile == "auto":
        return device.type == "cuda"
    return "blocks" if recipe.train.compile == "blocks" else recipe.train.compile == "on"


def smaller_run(recipe: Recipe, device: torch.device) -> str:
    """What to try where a recipe would take for ever on this machine."""
    if device.type == "cuda":
        return f"Fewer train.epochs, or more GPUs: see `ijepa plan {recipe.name} --gpus N`"
    words = ["ijepa", "pretrain", "shapes-tiny"]
    if recipe.data.path is not None:
        words += ["--data.path", recipe.data.path]
    return f"Without a GPU a small recipe fits: `{shlex.join(words)}`"


def images_per_second_at_peak(recipe: Recipe, device: torch.device) -> float | None:
    """What the matmul rate of all ranks' GPUs would allow, None where it is not known."""
    gpu = known_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if gpu is None:
        return None
    flops = flops_per_image(recipe, from_recipe.micro_batch_size(recipe))
    return distributed.world_size() * gpu.teraflops * 1e12 / flops


def random_states() -> dict[str, Tensor]:
    """State of torch's own generators; data and masks do not draw from them."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """The inverse of `random_states`, as far as this machine has the devices."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
