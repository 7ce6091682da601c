"""Files that are written whole or not at all, on a disk that may be full."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


class NotWritten(OSError):
    """Something could not be written; the message names the folder and the room there is."""


def free_bytes(folder: Path) -> int | None:
    """What an ordinary user may still write below `folder`; None where the file system won't say.

    A quota is not looked at: only writing shows it.
    """
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize if state.f_blocks else None


def require_space(what: str, folder: Path, needed: int) -> None:
    """Raise NotWritten unless `needed` bytes fit into `folder`."""
    free = free_bytes(folder)
    if free is not None and free < needed:
        raise NotWritten(
            f"{what} needs {readable_bytes(needed)} in {folder}, which has {readable_bytes(free)} "
            f"free: make room for {readable_bytes(needed - free)}"
        )


def not_written(what: str, folder: Path, error: BaseException) -> NotWritten:
    """The error of a write that failed all the same, with the room there is now."""
    if isinstance(error, NotWritten):
        return error
    free = free_bytes(folder) if folder.is_dir() else None
    room = "" if free is None else f"; {readable_bytes(free)} are free there"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return NotWritten(f"{what} could not be written into {folder}: {reason}{room}")


def readable_bytes(count: int) -> str:
    """999 -> "999 bytes", 1_500_000 -> "1.5 MB"."""
    if count < 1000:
        return f"{count} bytes"
    power = next((power for power in (1, 2, 3) if count < 999.95 * 1000**power), 4)
    return f"{count / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block ends well and vanishes otherwise.

    Raises:
        NotWritten: in place of an OSError, naming the file, its folder and the room there is.
    """
    aside = path.with_name(f".{path.stem}.partial{path.suffix}")  # writers go by the suffix
    try:
        yield aside
        sync(aside)
        aside.replace(path)
        sync(path.parent)
    except OSError as error:
        raise not_written(path.name, path.parent, error) from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()


def write_whole(path: Path, text: str) -> None:
    """Replace the file by `text`, in UTF-8; bytes of file names that are not UTF-8 are escaped.

    Raises:
        NotWritten: the old file, if any, is as it was.
    """
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
