"""What a run's steps were: shown, and written into its log, one step late."""

from __future__ import annotations

from typing import Any

from ijepa.config import Recipe
from ijepa.report.metrics import MetricsWriter
from ijepa.report.progress import RunProgress
from ijepa.train.divergence import TooManySkips
from ijepa.train.trainer import LateResult, Trainer


class Figures:
    """Takes the figures of each step to the live line and to the log.

    Args:
        recipe: settings, lengths in steps.
        metrics: the log; None on ranks that write none.
    """

    def __init__(
        self, recipe: Recipe, trainer: Trainer, progress: RunProgress, metrics: MetricsWriter | None
    ):
        self._recipe, self._trainer = recipe, trainer
        self._progress, self._metrics = progress, metrics
        self._compilations_noted = 0
        self._metrics_failing = False

    def observe(self, late: LateResult | None) -> None:
        """Show and write down the figures of a step that is over.

        Raises:
            TooManySkips: naming the step where it began.
        """
        if late is None:
            return
        loss, grad_norm, skipped, in_a_row = late.read()
        done, result, train = late.done, late.result, self._recipe.train
        self._progress.update(done, loss, result.lr)
        for seconds in list(self._trainer.compilations.values())[self._compilations_noted :]:
            self._compilations_noted += 1
            self._progress.note(
                f"step {done}: compiled for shapes {self._compilations_noted} in {seconds:.0f} s"
            )
        if skipped:
            self._progress.note(f"step {done}: loss {loss}, gradient norm {grad_norm}: not finite, "
                                "update skipped")  # fmt: skip
        if done % train.log_every == 0 or done in (1, train.num_steps) or skipped:
            finite = {"loss": loss, "grad_norm": grad_norm} if not skipped else {}
            self.write(
                done,
                **finite,
                lr=result.lr,
                weight_decay=result.weight_decay,
                momentum=result.momentum,
                images_per_second=round(self._progress.images_per_second, 1),
                skipped=int(skipped),
            )
        if in_a_row > self._recipe.optim.max_skipped_steps:
            first = done - in_a_row + 1
            raise TooManySkips(
                f"loss or gradients were not finite for {in_a_row} steps in a row, from step "
                f"{first} on. Nothing was saved since. Start again with a lower "
                "schedule.peak_lr, optim.max_grad_norm, or train.precision fp32",
                good_before=first - 1,  # the weights after that step are what this began with
            )

    def write(self, step: int, **values: Any) -> None:
        """A line of the log; where it finds no room, that is told once."""
        if self._metrics is not None:
            self._metrics.write(step, values)
            failure = self._metrics.failure or self._metrics.events_failure
            if failure is not None and not self._metrics_failing:
                self._progress.note(f"step {step}: {failure}")
            self._metrics_failing = failure is not None
