"""What the commands print goes through here: any name can be said, and a long run outlives its
listener."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import TextIO, cast

from rich.console import Console

_NOBODY_LISTENS = (errno.EPIPE, errno.EIO, errno.ENXIO)


def say_any_name() -> None:
    """Escape what standard output's encoding lacks, as file names may hold, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def stop_listening_to(stream: TextIO) -> None:
    """What is written into a stream that nobody reads goes nowhere from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class RunConsole(Console):
    """A console whose output may come to an end, as a `tee`, a terminal or the room for a log on a
    disk: the run goes on unheard."""

    def __init__(self) -> None:
        stream = None if sys.stdout is None else cast(TextIO, _LastingOutput(sys.stdout))
        super().__init__(file=stream)


class _LastingOutput:
    """Standard output that says once, on standard error, why it cannot be written. On a full disk
    it tries again with every line, and what the stream had taken comes first."""

    def __init__(self, stream: TextIO):
        self._stream, self._told = stream, False

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._unwritten(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._unwritten(error)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def _unwritten(self, error: OSError) -> None:
        reason = f"output cannot be written ({error.strerror}): the run goes on, lines are missing"
        if error.errno in _NOBODY_LISTENS:
            stop_listening_to(self._stream)
            reason = "nobody reads the output any more: the run goes on without"
        if not self._told:
            self._told = True
            with contextlib.suppress(OSError):  # it may be the same file or terminal
                print(reason, file=sys.stderr)
