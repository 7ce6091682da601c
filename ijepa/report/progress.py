"""What a person sees while a run goes on: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 20.0  # without a terminal
SECONDS_UNTOLD = 3.0  # what takes longer before the first step is named
ABSURD_SECONDS = 30 * 86_400.0  # of time left


class RunProgress:
    """Step, loss, learning rate, images/s and time left of a run.

    Use as a context manager. Nothing is shown where `console` is None (ranks other than the first).

    Args:
        images_per_second_at_peak: what the GPUs' whole matmul rate would make of this step; the
            share of it reached (MFU) is then shown too. None where it is not known.
        first_is_slow: the first step compiles, and says nothing about the others.
        smaller: what to try where the time left is absurd.
    """

    def __init__(
        self,
        console: Console | None,
        total_steps: int,
        first_step: int,
        batch_size: int,
        images_per_second_at_peak: float | None = None,
        first_is_slow: bool = False,
        smaller: str = "",
    ):
        self._first_is_slow, self._smaller, self._warned = first_is_slow, smaller, False
        self._first_over: float | None = None
        self._at_peak = images_per_second_at_peak
        self._console = console
        self._total, self._first, self._batch = total_steps, first_step, batch_size
        self._started = self._last_line = time.perf_counter()
        self._rate_from = (self._started, first_step)
        self.images_per_second = 0.0
        self._live: Progress | None = None
        if console is not None and console.is_terminal:
            self._live = Progress(
                TextColumn("[bold]step {task.completed:,.0f}[/]/{task.total:,.0f}"),
                BarColumn(bar_width=None),
                TextColumn("loss [bold cyan]{task.fields[loss]}[/]"),
                TextColumn("lr {task.fields[lr]}"),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("[dim]left[/]"),
                TimeRemainingColumn(),
                console=console,
                expand=True,
            )
            self._task = self._live.add_task(
                "train", total=total_steps, completed=first_step, loss="-", lr="-", rate="-"
            )

    def __enter__(self) -> RunProgress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self) -> None:
        """The first step begins now: the time that is left is reckoned from here."""
        self._started = self._last_line = time.perf_counter()
        self._rate_from = (self._started, self._first)

    def update(self, step: int, loss: float, lr: float) -> None:
        """`step` steps are done, the last one with this loss and learning rate."""
        now = time.perf_counter()
        self._warn_where_absurd(step, now)
        since, at_step = self._rate_from
        if now - since >= 1.0 or at_step == self._first:
            self.images_per_second = (step - at_step) * self._batch / max(now - since, 1e-9)
        if now - since >= 1.0:
            self._rate_from = (now, step)
        if self._live is not None:
            rate = self._rate() if self.images_per_second else "- images/s"
            self._live.update(
                self._task, completed=step, loss=f"{loss:.4f}", lr=f"{lr:.2e}", rate=rate
            )
        elif self._console is not None:
            due = now - self._last_line >= SECONDS_BETWEEN_LINES
            if due or step in (self._first + 1, self._total):
                self._last_line = now
                left = (now - self._started) / max(step - self._first, 1) * (self._total - step)
                self._console.print(
                    f"step {step}/{self._total}  loss {loss:.4f}  lr {lr:.2e}  "
                    f"{self._rate()}  {format_seconds(left)} left",
                    highlight=False,
                )

    def _warn_where_absurd(self, step: int, now: float) -> None:
        """Once, where the run would take longer than anybody waits."""
        taken, seconds = step - self._first, now - self._started
        if self._first_is_slow:
            if self._first_over is None:
                self._first_over = now
            taken, seconds = taken - 1, now - self._first_over
        if self._warned or taken < 1:
            return
        left = seconds / taken * (self._total - step)
        if left > ABSURD_SECONDS:
            self._warned = True
            self.note(f"At this rate {format_seconds(left)} are left. {self._smaller}")

    def mfu(self) -> float | None:
        """Share of the GPUs' matmul rate that the run reaches, None where either is not known."""
        if not self.images_per_second or self._at_peak is None:
            return None
        return self.images_per_second / self._at_peak

    def _rate(self) -> str:
        share = self.mfu()
        shown = f"{self.images_per_second:,.0f} images/s"
        return shown if share is None else f"{shown} ({share:.0%} MFU)"

    def note(self, text: str) -> None:
        """A line that stays, above the live display."""
        if self._console is not None:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def telling(console: Console | None, what: str) -> Iterator[None]:
    """Around something that may take a while: says what it is once it does."""
    if console is None:
        yield
        return
    options = {"highlight": False, "markup": False, "soft_wrap": True}
    timer = threading.Timer(SECONDS_UNTOLD, console.print, (f"{what} ...",), options)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def format_seconds(seconds: float) -> str:
    """90 -> "1:30", 3700 -> "1:01:40", 200,000 -> "2 days 7 h"."""
    if seconds >= 2 * 86_400:
        days, hours = divmod(round(seconds / 3600), 24)
        return f"{days:,} days {hours} h"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
