"""Waiting for data without being deaf to a stop."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

PATIENCE = 3.0  # seconds that what is being done may still take once a stop is asked for
_SIGNAL = signal.SIGURG  # without a handler it does nothing, and nobody else uses it


class StoppedWaiting(BaseException):
    """A stop was asked for and the next batch did not come. No Exception: a decoder that takes
    every one for a damaged file must not take this."""


class StoppableWait:
    """Ends a wait of the main thread, by a signal that interrupts system calls, when a stop was
    asked for and nothing came for a while since.

    Use as a context manager, in the main thread.

    Args:
        stop_asked: whether the run is to stop.
        patience: seconds that a batch may still take after that; one that comes in time is trained
            on, and ranks then stop after the same step.
    """

    def __init__(self, stop_asked: Callable[[], bool], patience: float = PATIENCE):
        self._stop_asked, self._patience = stop_asked, patience
        self._waiting_since: float | None = None
        self._over = threading.Event()

    def __enter__(self) -> StoppableWait:
        self._previous = signal.signal(_SIGNAL, self._interrupt)
        self._watcher = threading.Thread(
            target=self._watch, args=(threading.get_ident(),), daemon=True
        )
        self._watcher.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._watcher.join()
        signal.signal(_SIGNAL, self._previous)

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items; raises StoppedWaiting where the next one does not come."""
        iterator = iter(items)
        while True:
            with self.stoppable():
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[None]:
        """Around what may be broken off anywhere; StoppedWaiting is then raised in it."""
        self._waiting_since = time.monotonic()
        try:
            yield
        finally:
            self._waiting_since = None

    def _watch(self, main_thread: int) -> None:
        asked_at: float | None = None
        while not self._over.wait(0.2):
            if asked_at is None and self._stop_asked():
                asked_at = time.monotonic()
            since = self._waiting_since
            if asked_at is None or since is None:
                continue
            if time.monotonic() - max(asked_at, since) > self._patience:
                signal.pthread_kill(main_thread, _SIGNAL)

    def _interrupt(self, _number: int, _frame) -> None:
        if self._waiting_since is not None:  # the batch may have come just now
            raise StoppedWaiting
