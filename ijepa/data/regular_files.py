"""Reading files that may turn out to be something else.

Opening a FIFO waits for a writer that may never come, and opening a device can do anything.
"""

from __future__ import annotations

import os
import stat

_KINDS = {
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


def kind_of_file(path: str) -> str | None:
    """ "FIFO", "socket" or "a device"; None for files, folders and what cannot be looked at."""
    try:
        mode = os.stat(path).st_mode
    except OSError:  # a link into nowhere, say: whoever opens it is told
        return None
    return _KINDS.get(stat.S_IFMT(mode))


MAX_BYTES = 1 << 29  # of one file; 50 million pixels of four 16-bit channels are fewer


def open_regular_file(path: str | os.PathLike) -> int:
    """A descriptor to read from, which the caller closes.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    # Without O_NONBLOCK the opening itself would wait where the path became a FIFO meanwhile.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(f"{_KINDS.get(stat.S_IFMT(mode), 'folder')}, not a file")
    return descriptor


def read_regular_file(path: str | os.PathLike, max_bytes: int = MAX_BYTES) -> bytes:
    """The whole content.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger than `max_bytes`: reading it
            could take all the memory there is.
    """
    descriptor = open_regular_file(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > max_bytes:
            raise OSError(f"{size:,} bytes, more than the limit of {max_bytes:,}")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(max_bytes)
        if data is None:  # of files below /proc, which are none
            raise OSError("nothing to read")
        return data
    finally:
        os.close(descriptor)
