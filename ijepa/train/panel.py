"""The collapse panel of a run: the same images, looked at every so many steps."""

from __future__ import annotations

import dataclasses

from rich.console import Console
from torch import Tensor

from ijepa.config import Recipe
from ijepa.data.sources import ImageSource
from ijepa.evaluate.collapse import Panel, collapse_panel, panel_line
from ijepa.evaluate.features import encoder_features
from ijepa.model import IJEPA
from ijepa.report.progress import RunProgress, telling
from ijepa.train import distributed, from_recipe
from ijepa.train.figures import Figures


class RunPanel:
    """Looks at what the target encoder makes of some training images.

    Args:
        console: told what takes a while.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: ImageSource,
        model: IJEPA,
        *,
        figures: Figures,
        progress: RunProgress,
        console: Console | None,
    ):
        self._recipe, self._source, self._model = recipe, source, model
        self._figures, self._progress, self._console = figures, progress, console
        self._images: tuple[Tensor, Tensor | None] | None = None

    def look(self, done: int) -> Panel | None:
        """Show and write down the panel after `done` steps, on the first rank; None elsewhere, and
        where there is nothing to compare."""
        if not distributed.is_main():
            return None
        with telling(self._console, f"Panel on {self._recipe.monitor.images:,} images"):
            return self._look(done)

    def _look(self, done: int) -> Panel | None:
        images, labels = self.images()
        if images.shape[0] < 2:
            return None  # said at the start
        features = encoder_features(self._model.target_encoder, images).last
        panel = collapse_panel(features, labels)
        self._figures.write(done, **dataclasses.asdict(panel))
        self._progress.note(panel_line(done, panel))
        return panel

    def images(self) -> tuple[Tensor, Tensor | None]:
        """(n, C, H, W) uint8 and the labels (n,) int64 of the first task, read once."""
        if self._images is None:
            view = from_recipe.viewing_transform(self._recipe)
            count = self._recipe.monitor.images
            images, labels = from_recipe.load_subset(self._source, view, count)
            self._images = images, next(iter(labels.values()), None)
        return self._images
