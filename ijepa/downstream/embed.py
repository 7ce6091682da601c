"""Features of every image of a source, into a folder of `feature_files`, on all ranks."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from ijepa.data.batch import ImageBatch
from ijepa.data.identity import source_identity
from ijepa.data.in_order import batches_in_order, without_keys
from ijepa.data.sources import ImageSource
from ijepa.data.views import Transform
from ijepa.downstream.feature_files import FeatureFiles
from ijepa.evaluate.features import Layers
from ijepa.evaluate.pretrained import PretrainedEncoder
from ijepa.report.counting import Counting
from ijepa.train import distributed

_SECONDS_BETWEEN_COMMITS = 2.0


@dataclass(frozen=True)
class Embedding:
    """How features are computed; all but `workers` decides about their last bits.

    Attributes:
        layers: "last" block or the "last4".
        transform: what an image looks like to the encoder.
        batch_size: images embedded at once.
        precision: "fp32", or "bf16" by autocast.
        workers: processes that decode; None chooses by the device and the cores.
    """

    layers: Layers
    transform: Transform
    batch_size: int = 64
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: int | None = None


@dataclass(frozen=True)
class Embedded:
    """What came of it, on the first rank.

    Attributes:
        rows: images with features.
        unreadable: name -> why there are none.
        images_per_second: of what was done now; None where all was there.
    """

    rows: int
    unreadable: dict[str, str]
    images_per_second: float | None


def embed_source(
    encoder: PretrainedEncoder,
    source: ImageSource,
    out: Path,
    embedding: Embedding,
    *,
    about: dict[str, Any] | None = None,
    name_of: Callable[[int], str] | None = None,
    console: Console | None = None,
    what: str = "embedding",
) -> Embedded | None:
    """Write the features of all images into `out`, or the rest of them.

    Batches are the same whatever the number of ranks and wherever it was interrupted, so that the
    bytes are, too, on processors of one kind.

    Args:
        encoder: on the device to compute on.
        about: JSON values that are written into embed.json beside what decides about the features.
        name_of: image number -> its line in names.txt; default: the source's own name for it.
        console: where progress is shown; None is silent.

    Returns:
        What came of it; None on ranks other than the first.

    Raises:
        ValueError: `out` holds something else, or no image could be read.
        NotWritten: no room; what was committed stays.
    """
    files: FeatureFiles | None = None

    def begin() -> tuple[int, bool]:
        nonlocal files
        identity = features_identity(encoder, source, embedding)
        files = FeatureFiles(out, identity, encoder.feature_width(embedding.layers), about)
        return files.done, files.complete

    done, complete = distributed.on_main(begin)
    rate = None
    try:
        if not complete:
            names = name_of or source.name
            rate = _embed_rest(encoder, source, done, files, embedding, names, console, what)
        if files is not None and files.rows == 0:
            name, reason = next(iter(files.unreadable.items()))
            raise ValueError(f"none of {len(source):,} images could be read, as {name}: {reason}")
        return None if files is None else Embedded(files.rows, files.unreadable, rate)
    finally:
        if files is not None:
            files.close()


def features_identity(
    encoder: PretrainedEncoder, source: ImageSource, embedding: Embedding
) -> dict[str, Any]:
    """JSON values that decide about the features."""
    return {
        "encoder": encoder.fingerprint(),
        "layers": embedding.layers,
        "pool": "mean",
        "transform": repr(embedding.transform),
        "precision": embedding.precision,
        "batch_size": embedding.batch_size,
        "images": len(source),
        "images_hash": source_identity(source),
    }


def default_workers(device: torch.device) -> int:
    """Processes that decode for one rank: on a GPU the cores there are, up to 16.

    On the CPU one: the encoder takes all cores already, and one is enough to be always ahead.
    """
    if device.type == "cpu":
        return 1
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(cores // ranks, 16))


def _embed_rest(
    encoder: PretrainedEncoder,
    source: ImageSource,
    done: int,
    files: FeatureFiles | None,
    embedding: Embedding,
    name_of: Callable[[int], str],
    console: Console | None,
    what: str,
) -> float:
    """Embed the images from number `done` on; returns images a second."""
    started = committed = time.perf_counter()
    with Counting(console, what, len(source), done) as counting:
        for batch, features in _computed(encoder, source, done, embedding):
            parts = distributed.gather_to_main((features, batch.indices, batch.unreadable))
            if files is None or parts is None:
                continue
            for rows, indices, unreadable in parts:
                files.append(
                    rows,
                    [name_of(int(index)) for index in indices],
                    {name_of(index): reason for index, reason in unreadable.items()},
                )
                counting.advance(len(indices) + len(unreadable))
            if time.perf_counter() - committed >= _SECONDS_BETWEEN_COMMITS:
                files.commit()
                committed = time.perf_counter()
    if files is not None:
        files.commit(complete=True)
    return (len(source) - done) / (time.perf_counter() - started)


def _computed(
    encoder: PretrainedEncoder, source: ImageSource, done: int, embedding: Embedding
) -> Iterator[tuple[ImageBatch, np.ndarray]]:
    """This rank's batches and their features (b, D), as many on every rank; some may be empty.

    The next batch is under way on a GPU while the one before is handed out.
    """
    device = encoder.pos_embed.device
    size, ranks, rank = embedding.batch_size, distributed.world_size(), distributed.rank()
    starts = range(done, len(source), size)
    rounds = -(-len(starts) // ranks)
    mine = [done + size * (turn * ranks + rank) for turn in range(rounds)]
    ranges = [np.arange(min(at, len(source)), min(at + size, len(source))) for at in mine]
    workers = default_workers(device) if embedding.workers is None else embedding.workers
    pinned = device.type == "cuda"
    under_way: tuple[ImageBatch, torch.Tensor] | None = None
    asked = without_keys(ranges)
    for batch in batches_in_order(source, embedding.transform, asked, workers, pinned):
        images = batch.images.to(device, non_blocking=True)
        with autocast(device, embedding.precision):
            features = encoder.embed(images, embedding.layers)
        if under_way is not None:
            yield under_way[0], under_way[1].cpu().numpy()
        under_way = batch, features
    if under_way is not None:
        yield under_way[0], under_way[1].cpu().numpy()


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Around an encoder's work: its products in bfloat16 for "bf16", as they are for "fp32"."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()
