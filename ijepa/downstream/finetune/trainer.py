"""One step of fine-tuning, as a pure function of its number and of the weights before it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from masked_vit_kernels.pixels import normalize_images
from torch import Tensor

from ijepa.counter_rng import derive_keys, random_bits
from ijepa.data.batch import ImageBatch
from ijepa.data.in_order import batches_in_order
from ijepa.data.rand_augment import rand_augment
from ijepa.data.views import Transform
from ijepa.downstream.embed import autocast
from ijepa.downstream.finetune.layer_decay import decayed_groups
from ijepa.downstream.finetune.mixing import mixed, smoothed, soft_cross_entropy, step_generator
from ijepa.downstream.finetune.presets import FinetuneSettings
from ijepa.evaluate.drop_path import drop_path_chances
from ijepa.evaluate.pretrained import PretrainedEncoder
from ijepa.evaluate.tasks import Split

_ORDER_STREAM, _VIEW_STREAM = 0xF17E, 0xF17F


class LossNotFinite(RuntimeError):
    """Training has diverged; nothing was saved since."""


class FinetuneTrainer:
    """Trains a classifier.

    Args:
        network: on its device.
        images: n of the training set; an epoch is n // step_images steps, at least one.
        seed: of everything that is drawn.
        precision: "fp32", or "bf16" by autocast.

    Attributes:
        step_images: images a step, at most n.
        steps_per_epoch, total_steps: lengths.
        done: steps taken.
    """

    def __init__(
        self,
        network: PretrainedEncoder,
        settings: FinetuneSettings,
        images: int,
        *,
        seed: int,
        precision: str = "fp32",
    ):
        self.network, self.settings = network, settings
        self._seed, self._precision = seed, precision
        self.step_images = min(settings.step_images, images)
        self.steps_per_epoch = max(images // self.step_images, 1)
        self.total_steps = settings.epochs * self.steps_per_epoch
        self.done = 0
        depth = network.config.depth
        self._drop_path = drop_path_chances(settings.drop_path, depth)
        groups = decayed_groups(network, depth, settings.layer_decay, settings.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999))  # type: ignore[arg-type]

    def step(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """One update from micro-batches of uint8 images and labels; returns the loss, 0-d.

        Raises:
            LossNotFinite: before anything is updated.
        """
        network, settings, device = self.network, self.settings, self.network.pos_embed.device
        total, images_in_all = (
            torch.zeros((), device=device),
            sum(len(labels) for _, labels in parts),
        )
        rng = step_generator(self._seed, self.done)
        for images, labels in parts:
            pixels = normalize_images(images, network.image_mean, network.image_std)
            targets = smoothed(labels, len(network.class_names), settings.smoothing)
            pixels, targets = mixed(pixels, targets, settings.mixup, settings.cutmix, rng)
            with autocast(device, self._precision):
                logits = network.class_logits(pixels, self._drop_path)
            loss = soft_cross_entropy(logits, targets) * (len(labels) / images_in_all)
            loss.backward()
            total += loss.detach()
        if not math.isfinite(total.item()):
            raise LossNotFinite(
                f"the loss of step {self.done + 1} is not finite: try a lower --lr, or fp32"
            )
        lr = self.lr
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return total

    @property
    def lr(self) -> float:
        """The head's learning rate in the next step."""
        return self.settings.learning_rate(self.done, self.steps_per_epoch)

    def batches(
        self, split: Split, transform: Transform, workers: int, at_once: int
    ) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Micro-batches, of `at_once` images at most, of every step that is left.

        Order, views and augmentation are drawn by (seed, epoch, image).
        """
        device = self.network.pos_embed.device
        asked = _Pieces(self, len(split), min(at_once, self.step_images))
        augment = rand_augment if self.settings.rand_augment != "none" else None
        loaded = batches_in_order(
            split.source, transform, asked, workers, device.type == "cuda", augment
        )
        while self.done < self.total_steps:
            parts = [_on_device(next(loaded), split.labels, device) for _ in range(asked.in_a_step)]
            parts = [part for part in parts if len(part[1])]
            if not parts:
                raise ValueError("none of the images of a step could be read")
            yield parts

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the weights."""
        return {"optimizer": self.optimizer.state_dict(), "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = int(state["done"])


class _Pieces(Sequence):
    """Image numbers and keys of the micro-batches that are left, made as they are asked for."""

    def __init__(self, trainer: FinetuneTrainer, images: int, at_once: int):
        self._seed, self._first = trainer._seed, trainer.done
        self._size, self._at_once = trainer.step_images, at_once
        self._steps, self._per_epoch = trainer.total_steps, trainer.steps_per_epoch
        self._images = images
        self._order: tuple[int, np.ndarray] | None = None  # the last epoch's
        self.in_a_step = -(-self._size // at_once)

    def __len__(self) -> int:
        return (self._steps - self._first) * self.in_a_step

    def __getitem__(self, item):
        step, piece = divmod(item, self.in_a_step)
        epoch, place = divmod(self._first + step, self._per_epoch)
        if self._order is None or self._order[0] != epoch:
            key = derive_keys(self._seed, _ORDER_STREAM, epoch).reshape(1)
            draws = random_bits(key, self._images)[0]
            self._order = epoch, draws.argsort(kind="stable")
        first = place * self._size + piece * self._at_once
        stop = min(first + self._at_once, (place + 1) * self._size)
        numbers = self._order[1][first:stop]
        return numbers, derive_keys(self._seed, _VIEW_STREAM, epoch, numbers)


def _on_device(
    batch: ImageBatch, labels: np.ndarray, device: torch.device
) -> tuple[Tensor, Tensor]:
    images = batch.images.to(device, non_blocking=True)
    return images, torch.from_numpy(labels[batch.indices]).to(device)
