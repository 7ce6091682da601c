"""How far through a known number of things one is, how fast, and how long it will still take."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ijepa.report.progress import SECONDS_BETWEEN_LINES, format_seconds


class Counting:
    """A live line on a terminal, plain lines every 20 s elsewhere; use as a context manager.

    Args:
        console: None is silent.
        what: what is done, as "embedding".
        things: what is counted, as "images".
        total: of them.
        first: done before, by whoever was interrupted.
    """

    def __init__(
        self, console: Console | None, what: str, total: int, first: int = 0, things: str = "images"
    ):
        self._console, self._what, self._things = console, what, things
        self._total, self._first, self.done = total, first, first
        self._started = self._last_line = time.perf_counter()
        self._live: Progress | None = None
        if console is not None and console.is_terminal:
            self._live = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TextColumn("[dim]left[/]"),
                TimeRemainingColumn(),
                console=console,
                expand=True,
            )
            self._task = self._live.add_task(what, total=total, completed=first, rate="")

    def __enter__(self) -> Counting:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._live is not None:
            self._live.stop()

    def advance(self, count: int, shown: str = "") -> None:
        """`count` more are done.

        Args:
            shown: a figure to show beside the rate, as "loss 2.31".
        """
        self.done += count
        now = time.perf_counter()
        rate = (self.done - self._first) / max(now - self._started, 1e-9)
        beside = f"{shown}  {rate:,.0f} {self._things}/s".strip()
        if self._live is not None:
            self._live.update(self._task, completed=self.done, rate=beside)
        elif self._console is not None and (
            now - self._last_line >= SECONDS_BETWEEN_LINES or self.done >= self._total
        ):
            self._last_line = now
            left = (self._total - self.done) / max(rate, 1e-9)
            self._console.print(
                f"{self._what} {self.done:,}/{self._total:,}  {beside}  "
                f"{format_seconds(left)} left",
                highlight=False,
            )
