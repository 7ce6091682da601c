"""A grid of heads trained on a task by a protocol."""

from __future__ import annotations

import torch
from rich.console import Console

from ijepa.downstream.protocols import LinearProtocol
from ijepa.downstream.task_features import Features, ViewedFeatures, blocks_of, steps_per_epoch
from ijepa.evaluate.heads import Head, HeadGrid
from ijepa.evaluate.pretrained import PretrainedEncoder
from ijepa.report.counting import Counting

_TEST_ROWS = 4096


def train_grid(
    train: Features | ViewedFeatures,
    test: Features,
    encoder: PretrainedEncoder,
    classes: int,
    protocol: LinearProtocol,
    *,
    images: int,
    seed: int,
    console: Console | None,
) -> list[tuple[Head, float]]:
    """Every head of the protocol's grid and its accuracy in [0, 1] on the test rows.

    A step takes the protocol's batch, or all images where they are fewer; the learning rate is that
    of the batch that was taken.
    """
    device = encoder.pos_embed.device
    batch = min(protocol.batch_size, images)
    grid = HeadGrid(
        encoder.config.width,
        blocks_of(encoder),
        classes,
        lrs=[lr * batch / 256 for lr in protocol.lrs],
        weight_decays=protocol.weight_decays,
        optimizer=protocol.optimizer,
        seed=seed,
        device=device,
    )
    steps = steps_per_epoch(images, batch)
    done = 0
    with Counting(console, "training heads", protocol.epochs * steps, things="steps") as counting:
        for epoch in range(protocol.epochs):
            for features, labels in train.batches(batch, seed, epoch):
                factor = protocol.factor(done, steps)
                losses = grid.train(features.to(device), labels.to(device), factor)
                done += 1
                counting.advance(1, f"lowest loss {losses.min().item():.3f}")
    correct = torch.zeros(len(grid.heads), dtype=torch.int64, device=device)
    for start in range(0, len(test.labels), _TEST_ROWS):
        rows = slice(start, start + _TEST_ROWS)
        features = torch.from_numpy(test.last4[rows].copy()).to(device)
        correct += grid.correct(features, torch.from_numpy(test.labels[rows]).to(device))
    accuracies = (correct.double() / len(test.labels)).tolist()
    return list(zip(grid.heads, accuracies, strict=True))
