"""Frozen features evaluated: nearest neighbours, linear probes, few labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from ijepa.data.views import Transform
from ijepa.downstream.embed import Embedding
from ijepa.downstream.embed_folder import open_encoder, transform_at
from ijepa.downstream.linear_probe import train_grid
from ijepa.downstream.options import EvalOptions, KnnOptions, LinearOptions, LowshotOptions
from ijepa.downstream.protocols import PROTOCOLS, LinearProtocol, is_random, view_transform
from ijepa.downstream.results import Figure, Result, show_result, write_result
from ijepa.downstream.task_features import Features, ViewedFeatures, cached_features
from ijepa.evaluate.features import LAYERS
from ijepa.evaluate.guessing import commonest_class_accuracy
from ijepa.evaluate.knn import knn_accuracies
from ijepa.evaluate.linear import linear_probe_accuracy
from ijepa.evaluate.low_shot import draw_per_class, listed_images, logistic_accuracies
from ijepa.evaluate.pretrained import PretrainedEncoder
from ijepa.evaluate.tasks import Task, open_task
from ijepa.recipes import check_known
from ijepa.report.console import RunConsole
from ijepa.train.from_recipe import choose_device


@dataclasses.dataclass(frozen=True)
class Bench:
    """An encoder on its device and a task for it."""

    encoder: PretrainedEncoder
    task: Task
    embedding: Embedding
    console: Console

    def features(self, part: Literal["train", "test"], view: Transform | None = None) -> Features:
        """Features of the training or the test images, of the encoder's own view or another."""
        embedding = self.embedding
        if view is not None:
            embedding = dataclasses.replace(embedding, transform=view)
        split = self.task.train if part == "train" else self.task.test
        return cached_features(
            self.encoder, split, embedding, console=self.console, what=f"embedding {part} images"
        )


def evaluate(options: EvalOptions) -> Result:
    """Run an evaluation, show its table, and write it where the options say so.

    Raises:
        ValueError: an encoder, data or settings that do not fit together.
    """
    bench = open_bench(options)
    protocols: dict[type, Callable[[Any, Bench], Result]] = {
        KnnOptions: _knn,
        LinearOptions: _linear,
        LowshotOptions: _lowshot,
    }
    result = protocols[type(options)](options, bench)
    show_result(result, bench.console)
    if options.out is not None:
        write_result(result, options.out)
    return result


def open_bench(options: EvalOptions) -> Bench:
    """The encoder and the task that the options name."""
    device = choose_device(options.encoder.device)
    encoder = open_encoder(options.source, options.encoder, device)
    if options.random_network:
        torch.manual_seed(options.seed)
        encoder = PretrainedEncoder(encoder.config, None, encoder.transform).to(device)
    transform = transform_at(encoder, options.encoder.image_size)
    task = open_task(
        options.data, options.path, channels=encoder.config.channels, image_size=transform.size
    ).limited(options.train_images, options.test_images)
    embedding = Embedding(
        "last4",
        transform,
        options.encoder.batch_size,
        options.encoder.precision,
        options.encoder.workers,
    )
    return Bench(encoder, task, embedding, RunConsole())


def result_of(
    options: EvalOptions, bench: Bench, protocol: str, figures: list[Figure], **settings: Any
) -> Result:
    """A result with what is the same in all of them."""
    task = bench.task
    chance = commonest_class_accuracy(
        torch.from_numpy(task.train.labels), torch.from_numpy(task.test.labels)
    )
    return Result(
        protocol=protocol,
        task=task.name if options.data in ("folder", "csv") else options.data,
        source="random network" if options.random_network else str(options.source),
        encoder=bench.encoder.fingerprint(),
        train_images=len(task.train),
        test_images=len(task.test),
        classes=task.classes,
        chance=chance,
        figures=tuple(figures),
        settings={"seed": options.seed, "transform": repr(bench.embedding.transform), **settings},
    )


def _knn(options: KnnOptions, bench: Bench) -> Result:
    train, test = bench.features("train"), bench.features("test")
    figures = []
    for layers in LAYERS:
        accuracies = knn_accuracies(
            *train.tensors(layers),
            *test.tensors(layers),
            neighbours=options.neighbours,
            temperature=options.temperature,
            device=bench.encoder.pos_embed.device,
        )
        figures += [Figure(f"{layers}, k {count}", a) for count, a in accuracies.items()]
    return result_of(options, bench, "knn", figures, temperature=options.temperature)


def _linear(options: LinearOptions, bench: Bench) -> Result:
    if options.solver == "lbfgs":
        return _linear_by_lbfgs(options, bench)
    check_known([options.protocol], list(PROTOCOLS), "unknown protocol")
    protocol = _adapted(PROTOCOLS[options.protocol], options)
    size = bench.embedding.transform.size
    views = [
        view_transform(view, bench.embedding.transform, size)
        for view in (protocol.train_view, protocol.test_view)
    ]
    train: Features | ViewedFeatures
    if is_random(protocol.train_view):
        train = ViewedFeatures(bench.encoder, bench.task.train, views[0], bench.embedding)
    else:
        train = bench.features("train", views[0])
    test = bench.features("test", views[1])
    accuracies = train_grid(
        train, test, bench.encoder, bench.task.classes, protocol,
        images=len(bench.task.train), seed=options.seed, console=bench.console,
    )  # fmt: skip
    figures = [Figure(str(head), accuracy) for head, accuracy in accuracies]
    return result_of(options, bench, "linear", figures, preset=options.protocol,
                     **dataclasses.asdict(protocol))  # fmt: skip


def _linear_by_lbfgs(options: LinearOptions, bench: Bench) -> Result:
    train, test = bench.features("train"), bench.features("test")
    figures = [
        Figure(layers, linear_probe_accuracy(*train.tensors(layers), *test.tensors(layers)))
        for layers in LAYERS
    ]
    return result_of(options, bench, "linear", figures, solver="lbfgs")


def _adapted(protocol: LinearProtocol, options: LinearOptions) -> LinearProtocol:
    """With the epochs and the batch that are asked for."""
    if options.epochs is not None:
        if options.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {options.epochs}")
        share = options.epochs / protocol.epochs
        milestones = tuple(round(milestone * share) for milestone in protocol.milestones)
        protocol = dataclasses.replace(protocol, epochs=options.epochs, milestones=milestones)
    if options.step_images is not None:
        if options.step_images < 2:
            raise ValueError(f"step_images must be at least 2, got {options.step_images}")
        protocol = dataclasses.replace(protocol, batch_size=options.step_images)
    return protocol


def _lowshot(options: LowshotOptions, bench: Bench) -> Result:
    if (options.per_class is None) == (options.list is None):
        raise ValueError("lowshot takes either --per-class N or --list FILE")
    if options.draws < 1:
        raise ValueError(f"draws must be at least 1, got {options.draws}")
    train, test = bench.features("train"), bench.features("test")
    chosen = []
    for draw in range(options.draws if options.list is None else 1):
        if options.list is not None:
            source = bench.task.train.source
            names = [source.name(index) for index in range(len(source))]
            chosen.append(np.flatnonzero(np.isin(train.images, listed_images(options.list, names))))
        else:
            assert options.per_class is not None
            seed = options.seed + draw
            chosen.append(draw_per_class(train.labels, options.per_class, bench.task.classes, seed))
    figures = []
    for layers in LAYERS:
        found: dict[float, list[float]] = {}
        for rows in chosen:
            accuracies = logistic_accuracies(
                train.of(layers)[rows], train.labels[rows], test.of(layers), test.labels
            )
            for strength, accuracy in accuracies.items():
                found.setdefault(strength, []).append(accuracy)
        figures += [
            Figure(f"{layers}, lambda {strength:g}", float(np.mean(values)), tuple(values))
            for strength, values in found.items()
        ]
    return result_of(options, bench, "lowshot", figures, per_class=options.per_class,
                     list=None if options.list is None else str(options.list),
                     labelled_images=len(chosen[0]), draws=len(chosen))  # fmt: skip
