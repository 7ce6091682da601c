"""Features of a task's images: kept on disk, or computed anew for every random view."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from ijepa.counter_rng import derive_keys, random_bits
from ijepa.data import default_cache
from ijepa.data.in_order import batches_in_order
from ijepa.data.views import Transform
from ijepa.downstream.embed import (
    Embedding,
    autocast,
    default_workers,
    embed_source,
    features_identity,
)
from ijepa.downstream.feature_files import read_features
from ijepa.evaluate.features import CONCATENATED_BLOCKS
from ijepa.evaluate.pretrained import PretrainedEncoder
from ijepa.evaluate.tasks import Split

_ORDER_STREAM, _VIEW_STREAM = 0x0E0C, 0x0E0D


@dataclass(frozen=True)
class Features:
    """Features of the last blocks, the last one's at the end, and labels.

    Attributes:
        last4: (n, blocks * D) float32, a map of a file.
        labels: (n,) int64.
        images: (n,) int64, their numbers in the split.
        width: D.
        unreadable: images left out.
    """

    last4: np.ndarray
    labels: np.ndarray
    images: np.ndarray
    width: int
    unreadable: int

    def of(self, layers: str) -> np.ndarray:
        """(n, D) of the "last" block, or all of "last4"."""
        return self.last4 if layers == "last4" else self.last4[:, -self.width :]

    def tensors(self, layers: str) -> tuple[Tensor, Tensor]:
        """Features of these layers and labels, in memory."""
        return torch.from_numpy(np.array(self.of(layers))), torch.from_numpy(self.labels)

    def batches(self, size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches, all of one size (all rows, where there are fewer)."""
        for rows in _shuffled(len(self.labels), size, seed, epoch):
            yield torch.from_numpy(self.last4[rows]), torch.from_numpy(self.labels[rows])


def cached_features(
    encoder: PretrainedEncoder,
    split: Split,
    embedding: Embedding,
    *,
    console: Console | None,
    what: str,
) -> Features:
    """Features of a split, from the disk where they are there already.

    They are kept in $IJEPA_CACHE/features, in a folder whose name is a hash of the encoder's
    weights, the images and their view. A computation that was interrupted goes on.
    """
    identity = json.dumps(features_identity(encoder, split.source, embedding), sort_keys=True)
    name = hashlib.sha256(identity.encode()).hexdigest()[:24]
    folder = default_cache() / "features" / name
    embed_source(encoder, split.source, folder, embedding, name_of=str, console=console, what=what)
    features, names, described = read_features(folder)
    images = np.array([int(name) for name in names])
    return Features(
        features,
        split.labels[images],
        images,
        encoder.config.width,
        described["unreadable_count"],
    )


@dataclass(frozen=True)
class ViewedFeatures:
    """Features of random views, computed by the encoder as they are asked for.

    Attributes:
        encoder: on its device.
        split: images and labels.
        transform: a view for every key.
        embedding: how features are computed.
    """

    encoder: PretrainedEncoder
    split: Split
    transform: Transform
    embedding: Embedding

    def batches(self, size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches of (b, blocks * D) features and (b,) labels, on the device."""
        device = self.encoder.pos_embed.device
        groups = _shuffled(len(self.split), size, seed, epoch)
        at_once = self.embedding.batch_size
        pieces = [
            (part, derive_keys(seed, _VIEW_STREAM, epoch, part))
            for rows in groups
            for part in _cut(rows, at_once)
        ]
        workers = self.embedding.workers
        loaded = batches_in_order(
            self.split.source,
            self.transform,
            pieces,
            default_workers(device) if workers is None else workers,
            device.type == "cuda",
        )
        for rows in groups:
            features, labels = [], []
            for _ in _cut(rows, at_once):
                batch = next(loaded)
                images = batch.images.to(device, non_blocking=True)
                with autocast(device, self.embedding.precision):
                    features.append(self.encoder.embed(images, "last4"))
                labels.append(torch.from_numpy(self.split.labels[batch.indices]).to(device))
            yield torch.cat(features), torch.cat(labels)


def blocks_of(encoder: PretrainedEncoder) -> int:
    """Blocks in "last4" features."""
    return min(CONCATENATED_BLOCKS, encoder.config.depth)


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Whole batches in a pass over the images, at least one."""
    return max(images // batch_size, 1)


def _shuffled(count: int, size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The rows of each batch; what is left over sits the epoch out."""
    key = derive_keys(seed, _ORDER_STREAM, epoch).reshape(1)
    order = random_bits(key, count)[0].argsort(kind="stable")
    size = min(size, count)
    return [order[at : at + size] for at in range(0, count - size + 1, size)]


def _cut(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[at : at + size] for at in range(0, len(rows), size)]
