"""Ctrl-C, SIGTERM and a closed terminal ask a run to stop and save."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable

_NAMES = {
    signal.SIGINT: "Ctrl-C",
    signal.SIGTERM: "SIGTERM",
    signal.SIGHUP: "the terminal was closed",
}


class StopSignals:
    """Ctrl-C, SIGTERM and SIGHUP ask for a stop after the step and are answered at once; a second
    Ctrl-C interrupts.

    Use as a context manager; the previous handlers are put back at its end. A run under nohup,
    which ignores SIGHUP, goes on ignoring it.

    Args:
        saved: what a second Ctrl-C leaves, as "step 500" or None where nothing is saved yet.
        speaks: False on ranks that leave the answer to another.
    """

    def __init__(self, saved: Callable[[], str | None], speaks: bool = True):
        self._saved, self._speaks = saved, speaks
        self._asked_at: float | None = None

    @property
    def requested(self) -> bool:
        """Whether the run is to stop."""
        return self._asked_at is not None

    def waited(self, seconds: float) -> bool:
        """Whether the stop was asked for this long ago."""
        return self._asked_at is not None and time.monotonic() - self._asked_at >= seconds

    def __enter__(self) -> StopSignals:
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        numbers = [n for n in _NAMES if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            self._leave_terminal()
        if not self.requested:
            self._asked_at = time.monotonic()
            self._answer(signal.Signals(number))

    def _leave_terminal(self) -> None:
        """What is printed from now on goes nowhere: writing to a terminal that is gone fails, and
        the run would end of that before it has saved."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)

    def _answer(self, number: signal.Signals) -> None:
        """Straight to the descriptor: a handler may have interrupted a write to the stream."""
        if not self._speaks:
            return
        text = f"\n{_NAMES[number]}: stopping at the end of this step or micro-batch, then saving."
        if number == signal.SIGINT:
            saved = self._saved()
            loss = "everything: nothing is saved yet" if saved is None else f"all since {saved}"
            text += f" Ctrl-C again stops at once and loses {loss}."
        with contextlib.suppress(OSError):  # nobody may be there to read it
            os.write(2, f"{text}\n".encode())
