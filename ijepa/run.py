"""A run: its folder, networks, data, and what happens between the steps."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor

from ijepa import components, distributed
from ijepa.captured import copied_beside
from ijepa.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from ijepa.config import Recipe
from ijepa.data import build_loader
from ijepa.evaluate.closing import closing_table
from ijepa.evaluate.features import encoder_features
from ijepa.mask_batch import MaskBatch
from ijepa.mask_sampler import plan_capacities
from ijepa.metrics import MetricsWriter
from ijepa.monitor import Panel, collapse_panel
from ijepa.plan import flops_per_image, known_gpu
from ijepa.progress import RunProgress
from ijepa.recipes import recipe_to_dict
from ijepa.report import RunReport, write_report
from ijepa.trainer import StepResult, Trainer
from ijepa.visualize import draw_mask_examples

_EXAMPLES = 8  # images that the masks are drawn on


class TooManySkips(RuntimeError):
    """Loss or gradients were not finite for too many steps in a row."""


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
        micro_batch = components.micro_batch_size(recipe)
        sampler = components.build_mask_sampler(
            recipe.masks, recipe.model.grid, micro_batch, device
        )
        source = components.open_source(recipe, progress=console is not None)
        self.recipe = recipe = recipe.in_steps(len(source))
        self.source = source
        self.data_id = {"source": recipe.data.source, **components.data_fingerprint(source)}
        self.model = components.build_model(recipe).to(device)
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
        if checkpoint is not None:
            self._restore(checkpoint)
        self.folder = self._open_folder(checkpoint)
        self.started = time.perf_counter()
        self.loader = build_loader(
            source,
            sampler,
            components.training_transform(recipe),
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
        self.metrics = self._open_metrics()
        self.progress = RunProgress(
            console,
            recipe.train.steps,
            self.first_step,
            recipe.train.batch_size,
            images_per_second_at_peak=images_per_second_at_peak(recipe, device),
        )
        self._panel_images: tuple[Tensor, Tensor | None] | None = None

    def batches(self) -> Iterator[tuple[int, list[Tensor], list[MaskBatch]]]:
        """(steps done after it, micro-batches of images, their masks), on the device."""
        images: list[Tensor] = []
        masks: list[MaskBatch] = []
        done, accumulate = self.first_step, self.recipe.train.accumulate
        pairs = ((batch.images, batch.masks) for batch in self.loader)
        for part, part_masks in copied_beside(pairs, self.device):
            images.append(part)
            masks.append(part_masks)
            if len(images) == accumulate:
                done += 1
                yield done, images, masks
                images, masks = [], []

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
            raise TooManySkips(
                f"loss or gradients were not finite for {in_a_row} steps in a row, from step "
                f"{done - in_a_row + 1} on. The weights of before are kept. Try a lower "
                "schedule.peak_lr, optim.max_grad_norm, or train.precision fp32"
            )

    def due(self, every: int, done: int) -> bool:
        """Whether something that happens every so many steps, and at the end, is; 0 is never."""
        return every > 0 and (done % every == 0 or done == self.recipe.train.steps)

    def look(self, done: int) -> None:
        """The collapse panel, on the first rank."""
        if not distributed.is_main():
            return
        images, labels = self._fixed_images()
        features = encoder_features(self.model.target_encoder, images).last
        panel = collapse_panel(features, labels)
        self._write(done, **dataclasses.asdict(panel))
        self.progress.note(panel_line(done, panel))

    def save(self, done: int) -> Path | None:
        """A checkpoint after `done` steps, by the first rank."""
        if not distributed.is_main():
            return None
        return save_checkpoint(
            self.folder,
            done,
            weights=self.trainer.weights(),
            state={"trainer": self.trainer.state_dict(), "random": random_states()},
            metadata={
                "config": recipe_to_dict(self.recipe),
                "data": {**self.data_id, "next_step": done},
                "seconds": self.seconds(),
            },
        )

    def conclude(self) -> None:
        """Closing probes, summary and pictures, by the first rank."""
        if not distributed.is_main():
            return
        recipe, seconds = self.recipe, self.seconds()
        images = None
        if recipe.monitor.evaluate:
            images = components.labelled_images(recipe, self.source, self.console is not None)
        probes = []
        if images is not None:
            self.progress.note("Fitting probes on the target encoder and the baselines ...")
            untrained = components.build_model(recipe).to(self.device)
            probes = closing_table(self.model, untrained, images)
        report = RunReport(
            folder=self.folder,
            recipe=recipe,
            images=len(self.source),
            seconds=seconds,
            skipped_steps=int(self.trainer.total_skips),
            unreadable=self.loader.unreadable.names,
            chance=images.chance if images is not None else {},
            probes=probes,
        )
        write_report(report, self._mask_examples(), self.console)

    def seconds(self) -> float:
        """Time spent training, over all parts of a resumed run."""
        return self.seconds_before + time.perf_counter() - self.started

    def close(self) -> None:
        """Close the files."""
        if self.metrics is not None:
            self.metrics.close()

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Weights, optimiser, counters and random states of a checkpoint."""
        self._check_data(checkpoint)
        try:
            self.model.load_state_dict(checkpoint.weights)
            self.trainer.load_state_dict(checkpoint.state["trainer"])
            set_random_states(checkpoint.state["random"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{checkpoint.path} does not fit this run: {error}") from None
        self.first_step = checkpoint.step
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

    def _open_folder(self, checkpoint: Checkpoint | None) -> Path:
        """The folder of the run, the same on all ranks."""
        folder: object = None
        if checkpoint is not None:
            folder = checkpoint.path.parent.parent
        elif distributed.is_main():
            folder = new_run_folder(self.recipe)
            settings = json.dumps(recipe_to_dict(self.recipe), indent=1)
            (folder / "recipe.json").write_text(settings, encoding="utf-8")
        return Path(str(distributed.from_main(folder)))

    def _open_metrics(self) -> MetricsWriter | None:
        if not distributed.is_main():
            return None
        return MetricsWriter(self.folder, self.first_step, self.recipe.train.tensorboard)

    def _write(self, done: int, **values) -> None:
        if self.metrics is not None:
            self.metrics.write(done, values)

    def _fixed_images(self) -> tuple[Tensor, Tensor | None]:
        """The panel's images and the labels of the first task, read once."""
        if self._panel_images is None:
            view = components.viewing_transform(self.recipe)
            count = self.recipe.monitor.images
            images, labels = components.load_subset(self.source, view, count)
            self._panel_images = images, next(iter(labels.values()), None)
        return self._panel_images

    def _mask_examples(self):
        """(H, W, 3) uint8 picture of fresh masks on the first of the panel's images."""
        images = self._fixed_images()[0][:_EXAMPLES]
        sampler = components.build_mask_sampler(
            self.recipe.masks, self.recipe.model.grid, len(images), torch.device("cpu")
        )
        generator = torch.Generator().manual_seed(self.recipe.train.seed)
        return draw_mask_examples(images, sampler(len(images), generator=generator))


def compiles(recipe: Recipe, device: torch.device) -> bool | Literal["blocks"]:
    """What of the step is to be compiled: all of it on a GPU unless told otherwise."""
    if recipe.train.compile == "auto":
        return device.type == "cuda"
    return "blocks" if recipe.train.compile == "blocks" else recipe.train.compile == "on"


def images_per_second_at_peak(recipe: Recipe, device: torch.device) -> float | None:
    """What the matmul rate of all ranks' GPUs would allow, None where it is not known."""
    gpu = known_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if gpu is None:
        return None
    flops = flops_per_image(recipe, components.micro_batch_size(recipe))
    return distributed.world_size() * gpu.teraflops * 1e12 / flops


def new_run_folder(recipe: Recipe) -> Path:
    """Make train.output, or the first free runs/<name>-<number>.

    Raises:
        ValueError: train.output holds a run already.
    """
    if recipe.train.output is not None:
        folder = Path(recipe.train.output)
        if (folder / "checkpoints").exists():
            raise ValueError(
                f"{folder} holds a run already: continue it with `ijepa pretrain --resume {folder}`"
                " or choose another train.output"
            )
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    number = 1
    while True:
        folder = Path("runs") / f"{recipe.name}-{number:03d}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder


def panel_line(done: int, panel: Panel) -> str:
    """The panel in one line."""
    knn = "" if panel.knn is None else f"  kNN {100 * panel.knn:.1f} %"
    return (
        f"step {done}: effective rank {panel.effective_rank:.1f}  std {panel.feature_std:.3f}  "
        f"cosine {panel.cosine:.3f}{knn}"
    )


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
