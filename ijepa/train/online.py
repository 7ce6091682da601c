"""What a run is judged by while it goes on, and by which its best checkpoint is kept.

Probes on labelled images where there are labels; else the label-free figure of the panel that
followed their accuracy best in our runs (docs/evaluation.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ijepa.config import Recipe
from ijepa.data.sources import ImageSource
from ijepa.evaluate.features import encoder_features
from ijepa.evaluate.online import OnlineScores, online_line, online_scores
from ijepa.model import IJEPA
from ijepa.report.progress import RunProgress
from ijepa.train import from_recipe
from ijepa.train.figures import Figures

# The share of the targets' variance that is predicted, beyond what the position tells: Spearman's
# rank correlation with the online linear probe over the looks of two runs was .93 and .94, of the
# effective rank .20 and .31, of the loss -.87 and -.71 (docs/evaluation.md).
LABEL_FREE = "r2"


class Score(NamedTuple):
    """The higher, the better.

    Attributes:
        figure: by what: "online_linear" or a figure of the panel.
    """

    figure: str
    value: float


class OnlineProbes:
    """Looks at what probes make of the target encoder's features; gradients know nothing of it."""

    def __init__(
        self,
        recipe: Recipe,
        source: ImageSource,
        *,
        figures: Figures,
        progress: RunProgress,
    ):
        self._recipe, self._source = recipe, source
        self._figures, self._progress = figures, progress
        self._images: tuple[Tensor, dict[str, Tensor]] | None = None
        enough = min(recipe.monitor.online_images, len(source)) >= 8
        self._probing = bool(source.labels) and enough

    def look(self, done: int, panel: Mapping[str, Any] | None, model: IJEPA) -> Score | None:
        """Show and write down the scores after `done` steps, by the first rank.

        Args:
            panel: figures of the same step.
            model: whole, on its device.

        Returns:
            What the run is judged by; None where nothing is known.
        """
        if not self._probing:
            return _label_free(panel)
        images, labels = self._labelled()
        scores = online_scores(encoder_features(model.target_encoder, images).last4, labels)
        if not scores:
            return None
        self._progress.note(online_line(done, scores))
        mean = {
            "online_linear": _mean(scores, "linear"),
            "online_knn": _mean(scores, "knn"),
        }
        several = {f"online_linear_{task}": s.linear for task, s in scores.items()}
        self._figures.write(done, **mean, **(several if len(scores) > 1 else {}))
        return Score("online_linear", mean["online_linear"])

    def _labelled(self) -> tuple[Tensor, dict[str, Tensor]]:
        """(n, C, H, W) uint8 and task -> (n,) int64, read once."""
        if self._images is None:
            view = from_recipe.viewing_transform(self._recipe)
            count = self._recipe.monitor.online_images
            self._images = from_recipe.load_subset(self._source, view, count)
        return self._images


def _label_free(panel: Mapping[str, Any] | None) -> Score | None:
    value = None if panel is None else panel.get(LABEL_FREE)
    return None if value is None else Score(LABEL_FREE, value)


def _mean(scores: dict[str, OnlineScores], name: str) -> float:
    """Over the tasks."""
    return sum(getattr(s, name) for s in scores.values()) / len(scores)
