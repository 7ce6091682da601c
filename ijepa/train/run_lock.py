"""One process at a time trains into a run's folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from pathlib import Path

FILE_NAME = "lock"
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class RunLocked(ValueError):
    """Another process trains into the folder; the message names it."""


class RunLock:
    """Holds `folder`/lock until `release` or the process's end, however it ends.

    A record lock: it belongs to this process alone, so that neither data workers that outlive a
    killed run nor forked children keep it; NFS carries it to the other machines. Where the file
    system has no locks the run goes on without.

    Args:
        what_is_done: to the folder by whoever holds it, for the message.

    Raises:
        RunLocked: another process holds it.
    """

    def __init__(self, folder: Path, what_is_done: str = "trained"):
        # A link is not followed: the file it leads to would be emptied.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(folder / FILE_NAME, flags, 0o666)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._descriptor, 1000, 0).decode(errors="replace").strip()
            os.close(self._descriptor)
            self._descriptor = -1
            if error.errno in _UNSUPPORTED:
                return
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise RunLocked(
                f"{folder} is being {what_is_done} by {holder or 'another process'}: wait until "
                "it ends, or stop it"
            ) from None
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name in it
            holder = f"process {os.getpid()} on {socket.gethostname()}"
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, holder.encode(), 0)

    def release(self) -> None:
        """Let others train into the folder."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
