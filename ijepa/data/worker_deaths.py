"""Data workers that die: noticed where a batch is waited for, and nowhere else.

torch's DataLoader also raises from a SIGCHLD handler, wherever the main thread happens to be: in
the middle of an update, or of a save.
"""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections.abc import Iterator


class WorkerDied(RuntimeError):
    """A data worker ended without having been asked to."""


@contextlib.contextmanager
def deaths_seen_while_waiting() -> Iterator[None]:
    """Around the start of a DataLoader's workers: puts the SIGCHLD handler of before back.

    Whoever waits for a batch then looks every five seconds whether its workers are alive.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # torch sets no handler there either
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def is_death_of_a_worker(error: Exception) -> bool:
    """Whether the DataLoader's error means that; an error that a worker met says "Caught"."""
    text = str(error)
    if "Caught " in text and "in DataLoader worker process" in text:
        return False
    if isinstance(error, ConnectionError | FileNotFoundError | EOFError):
        return True  # a batch was on its way, and its sender is no more
    death = r"DataLoader worker \(pid.*(exited unexpectedly|killed by signal)"
    return re.search(death, text) is not None
