"""The panel of a run: the same images under the same masks, looked at every so many steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ijepa.config import Recipe
from ijepa.data.sources import ImageSource
from ijepa.evaluate.collapse import collapse_panel, panel_line
from ijepa.evaluate.features import encoder_features
from ijepa.evaluate.learning import learning_line, measure_learning
from ijepa.evaluate.warnings import learning_warnings
from ijepa.masks.batch import MaskBatch
from ijepa.masks.from_config import build_mask_sampler
from ijepa.model import IJEPA
from ijepa.report.progress import RunProgress, telling
from ijepa.train import from_recipe
from ijepa.train.figures import Figures

_MASKED_IMAGES = 256  # of the panel's, that are predicted too
_MASKED_BATCH = 16  # one of them is differentiated beside the memory of a step


class RunPanel:
    """Looks at what the target encoder makes of some training images.

    Args:
        console: told what takes a while.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: ImageSource,
        *,
        figures: Figures,
        progress: RunProgress,
        console: Console | None,
    ):
        self._recipe, self._source = recipe, source
        self._figures, self._progress, self._console = figures, progress, console
        self._images: tuple[Tensor, Tensor | None] | None = None
        self._masks: list[MaskBatch] | None = None
        self._warned: set[str] = set()

    def look(self, done: int, model: IJEPA) -> dict[str, Any] | None:
        """Show and write down the panel after `done` steps, by the first rank; its figures. None
        where there is nothing to compare.

        Args:
            model: whole, on its device.
        """
        with telling(self._console, f"Panel on {self._recipe.monitor.images:,} images"):
            return self._look(done, model)

    def _look(self, done: int, model: IJEPA) -> dict[str, Any] | None:
        images, labels = self.images()
        if images.shape[0] < 2:
            return None  # said at the start
        features = encoder_features(model.target_encoder, images).last
        panel = collapse_panel(features, labels)
        learning = None if panel.not_finite else measure_learning(model, self._masked(model))
        figures = {"step": done, **dataclasses.asdict(panel)}
        line = panel_line(done, panel)
        if learning is not None:
            figures |= dataclasses.asdict(learning)
            line += f"  {learning_line(learning)}"
        self._progress.note(line)
        self._figures.write(**figures)
        width, warmup = self._recipe.model.width, self._recipe.schedule.warmup_steps
        warnings = learning_warnings(figures, width, warmup)
        for kind, sentence in warnings.items():
            if kind not in self._warned:
                self._warned.add(kind)
                self._progress.note(f"warning: {sentence}")
        return figures

    def _masked(self, model: IJEPA) -> list[tuple[Tensor, MaskBatch]]:
        """Batches of the panel's images and the masks they are always seen under."""
        device = model.context_encoder.pos_embed.device
        batches = self.images()[0][:_MASKED_IMAGES].split(_MASKED_BATCH)
        if self._masks is None:
            config, cpu = self._recipe.model, torch.device("cpu")
            sampler = build_mask_sampler(self._recipe.masks, config.grid, _MASKED_BATCH, cpu)
            generator = torch.Generator().manual_seed(self._recipe.train.seed)
            self._masks = [sampler(len(batch), generator=generator) for batch in batches]
        return [
            (images.to(device), masks.to(device))
            for images, masks in zip(batches, self._masks, strict=True)
        ]

    def images(self) -> tuple[Tensor, Tensor | None]:
        """(n, C, H, W) uint8 and the labels (n,) int64 of the first task, read once."""
        if self._images is None:
            view = from_recipe.viewing_transform(self._recipe)
            count = self._recipe.monitor.images
            images, labels = from_recipe.load_subset(self._source, view, count)
            self._images = images, next(iter(labels.values()), None)
        return self._images
