"""`ijepa eval finetune`: from an encoder and labelled images to a classifier and its accuracy."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from ijepa.data.in_order import batches_in_order, without_keys
from ijepa.data.sources import ArraySource
from ijepa.data.subset import SourceSubset
from ijepa.data.views import Squash, Transform
from ijepa.downstream.embed import autocast, default_workers
from ijepa.downstream.evaluation import Bench, open_bench, result_of
from ijepa.downstream.finetune import saving
from ijepa.downstream.finetune.network import classifier_from
from ijepa.downstream.finetune.presets import PRESETS, FinetuneSettings
from ijepa.downstream.finetune.trainer import FinetuneTrainer
from ijepa.downstream.options import FinetuneOptions
from ijepa.downstream.protocols import View, view_transform
from ijepa.downstream.results import Figure, Result, show_result, write_result
from ijepa.evaluate.low_shot import draw_per_class, listed_images
from ijepa.evaluate.pretrained import PretrainedEncoder, evaluation_crop
from ijepa.evaluate.tasks import Split, Task
from ijepa.report.counting import Counting
from ijepa.report.metrics import MetricsWriter
from ijepa.train.checkpoint import Checkpoint, holds_checkpoint
from ijepa.train.run_folder import free_folder, made_folder
from ijepa.train.run_lock import RunLock
from ijepa.train.schedules import due
from ijepa.train.stop_signals import StopSignals

_SETTINGS = [field.name for field in dataclasses.fields(FinetuneSettings)]


@dataclass(frozen=True)
class Finetuned:
    """Where a classifier lies, and its result; None where a signal stopped the run early."""

    folder: Path
    result: Result | None


def finetune(options: FinetuneOptions) -> Finetuned:
    """Fine-tune from the beginning.

    Raises:
        ValueError: an encoder, data or settings that do not fit together.
        LossNotFinite: training diverged; the checkpoints of before are kept.
        NotWritten: a checkpoint found no room.
    """
    return _run(options, settings_of(options), None)


def resume(
    folder: Path, *, path: Path | None = None, workers: int | None = None, device: str | None = None
) -> Finetuned:
    """Go on where a run of fine-tuning stopped, bit by bit on the CPU.

    Args:
        folder: of the run.
        path: where the data are now.
        workers, device: of this part of the run.

    Raises:
        CheckpointError: nothing to go on from, or other data than before.
    """
    checkpoint, options, settings = saving.load(folder)
    encoder = options.encoder
    if workers is not None:
        encoder = dataclasses.replace(encoder, workers=workers)
    if device is not None:
        encoder = dataclasses.replace(encoder, device=device)  # type: ignore[arg-type]
    options = dataclasses.replace(
        options, encoder=encoder, path=path or options.path, output=folder
    )
    return _run(options, settings, checkpoint)


def settings_of(options: FinetuneOptions) -> FinetuneSettings:
    """The preset with what was given in its place."""
    values = {name: getattr(options, name, None) for name in _SETTINGS}
    if options.random_network and values["layer_decay"] is None:
        values["layer_decay"] = 1.0  # nothing was learned that lower layers should keep
    return PRESETS[options.preset].changed(**values)


def _run(
    options: FinetuneOptions, settings: FinetuneSettings, checkpoint: Checkpoint | None
) -> Finetuned:
    if options.save_every < 1:
        raise ValueError(f"save_every must be at least 1, got {options.save_every}")
    bench = open_bench(options)
    task = labelled(bench.task, options)
    data_id = saving.data_identity(task)
    if checkpoint is not None:
        saving.check_same_data(checkpoint, data_id)
    network = classifier_from(bench.encoder, task.class_names, testing_view(bench), options.seed)
    trainer = FinetuneTrainer(
        network, settings, len(task.train),
        seed=options.seed, precision=options.encoder.precision,
    )  # fmt: skip
    torch.manual_seed(options.seed)  # of what drop path draws
    if checkpoint is not None:
        saving.restore(checkpoint, trainer)
    folder = run_folder(options, bench, new=checkpoint is None)
    lock = RunLock(folder)
    metrics = MetricsWriter(folder, trainer.done)
    try:
        finished = _train(trainer, task, options, bench, folder, metrics, data_id)
        if not finished:
            print(f"\nStopped and saved. Continue with:\n  {resume_command(folder)}")
            return Finetuned(folder, None)
    except Exception as error:
        if holds_checkpoint(folder):
            error.add_note(
                f"The last checkpoint is kept. Continue with:\n  {resume_command(folder)}"
            )
        raise
    finally:
        metrics.close()
        lock.release()
    accuracy = accuracy_on(network, task.test, options, bench.console)
    figures = [Figure(f"fine-tuned, {len(task.train):,} labels", accuracy)]
    result = result_of(options, dataclasses.replace(bench, task=task), "finetune", figures,
                       folder=str(folder), preset=options.preset, per_class=options.per_class,
                       steps=trainer.total_steps, view=repr(training_view(bench, options)),
                       **dataclasses.asdict(settings))  # fmt: skip
    show_result(result, bench.console)
    for path in (folder / "result.json", options.out):
        if path is not None:
            write_result(result, path)
    bench.console.print(f"classifier: {folder}", highlight=False, soft_wrap=True)
    return Finetuned(folder, result)


def _train(
    trainer: FinetuneTrainer,
    task: Task,
    options: FinetuneOptions,
    bench: Bench,
    folder: Path,
    metrics: MetricsWriter,
    data_id: dict,
) -> bool:
    """Take the steps that are left; False where a signal ended them early."""
    workers = _workers(task.train, options, trainer.network)
    counting = Counting(
        bench.console, "fine-tuning", trainer.total_steps, trainer.done, things="steps"
    )
    saved: list[int] = [trainer.done] if trainer.done else []
    steps = trainer.batches(
        task.train, training_view(bench, options), workers, options.encoder.batch_size
    )
    with counting, StopSignals(lambda: f"step {saved[-1]}" if saved else None) as stop:
        for parts in steps:
            lr = trainer.lr
            loss = trainer.step(parts).item()
            done = trainer.done
            metrics.write(done, {"loss": loss, "lr": lr})
            counting.advance(1, f"loss {loss:.3f}")
            if stop.requested or due(options.save_every, done, trainer.total_steps):
                metrics.sync()
                saving.save(folder, trainer, options, data_id)
                saved.append(done)
            if stop.requested and done < trainer.total_steps:
                return False
    return True


def labelled(task: Task, options: FinetuneOptions) -> Task:
    """The task with the few labels that are asked for, or all.

    Raises:
        ValueError: fewer images of a class, or a list of no image.
    """
    if options.per_class is not None and options.list is not None:
        raise ValueError("give --per-class or --list, not both")
    train = task.train
    if options.per_class is not None:
        train = train.subset(
            draw_per_class(train.labels, options.per_class, task.classes, options.seed)
        )
    elif options.list is not None:
        names = [train.source.name(index) for index in range(len(train))]
        train = train.subset(listed_images(options.list, names))
    return Task(task.name, train, task.test, task.class_names)


def accuracy_on(
    network: PretrainedEncoder, split: Split, options: FinetuneOptions, console: Console | None
) -> float:
    """Accuracy in [0, 1] on the test images that can be read."""
    size = options.encoder.batch_size
    parts = [np.arange(at, min(at + size, len(split))) for at in range(0, len(split), size)]
    right = seen = 0
    workers = _workers(split, options, network)
    with Counting(console, "testing", len(split)) as counting:
        for batch in batches_in_order(
            split.source, network.transform, without_keys(parts), workers
        ):
            if len(batch.images):
                with autocast(network.pos_embed.device, options.encoder.precision):
                    predicted = network.classify(batch.images).argmax(dim=1).cpu().numpy()
                right += int((predicted == split.labels[batch.indices]).sum())
                seen += len(predicted)
            counting.advance(len(batch.images) + len(batch.unreadable))
    if not seen:
        raise ValueError("none of the test images could be read")
    return right / seen


def testing_view(bench: Bench) -> Transform:
    """All of a rendered image; of others the centre, 224 of 256, or all above 224 pixels."""
    own = bench.embedding.transform
    return own if isinstance(own, Squash) else evaluation_crop(own.size)


def training_view(bench: Bench, options: FinetuneOptions) -> Transform:
    """What a training image looks like."""
    own = bench.embedding.transform
    default: View = "flipped squash" if isinstance(own, Squash) else "random crop"
    return view_transform(options.view or default, own, own.size)


def run_folder(options: FinetuneOptions, bench: Bench, *, new: bool) -> Path:
    """The folder of the run, made.

    Raises:
        ValueError: a new run's holds one already, or it cannot be made.
    """
    if options.output is not None:
        if new and holds_checkpoint(options.output):
            raise ValueError(
                f"{options.output} holds a run already: continue it with "
                f"`{resume_command(options.output)}`, or choose another --output"
            )
        return made_folder(options.output, "--output")
    return free_folder(f"finetune-{bench.task.name}", "--output")


def resume_command(folder: Path) -> str:
    """The command line that goes on from a run's folder."""
    return shlex.join(["ijepa", "eval", "finetune", "--resume", str(folder)])


def _workers(split: Split, options: FinetuneOptions, network: PretrainedEncoder) -> int:
    """Processes that decode; pixels in memory need none."""
    if options.encoder.workers is not None:
        return options.encoder.workers
    source = split.source.source if isinstance(split.source, SourceSubset) else split.source
    augmented = options.rand_augment != "none" and options.preset != "small"
    if isinstance(source, ArraySource) and not augmented:
        return 0
    return default_workers(network.pos_embed.device)
