"""What was found in a large folder, kept until one of its folders changes.

A folder's time changes when a file in it comes, goes or is renamed. A file whose content changes
is the same image of the list; it is opened anew each time anyway.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ijepa.data.cache_folder import index_cache
from ijepa.data.packed_strings import joined, split
from ijepa.disk import NotWritten, written_aside

KEPT_FROM = 10_000  # images; fewer are found in no time
_FORMAT = 1
# A folder that changed so shortly before it was looked into may change again within one tick of
# its file system's clock.
_SETTLED = 2.0  # seconds


def _place(root: Path) -> Path:
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]
    return index_cache() / f"folder-{name}.npz"


def _states(folders: Sequence[str]) -> np.ndarray | None:
    """(n, 2) int64 size and time in nanoseconds of each folder; None where one is gone."""
    try:
        states = [os.stat(folder) for folder in folders]
    except OSError:
        return None
    return np.array([(state.st_size, state.st_mtime_ns) for state in states], dtype=np.int64)


def load_scan(root: Path) -> tuple[list[str], list[str]] | None:
    """(sorted relative paths, what was left out) of an earlier scan; None where there is none or a
    folder has changed since."""
    try:
        with np.load(_place(root), allow_pickle=False) as kept:
            if int(kept["format"]) != _FORMAT:
                return None
            states = _states(split(kept["folders"]))
            if states is None or not np.array_equal(states, kept["states"]):
                return None
            return split(kept["paths"]), split(kept["left_out"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def keep_scan(
    root: Path, paths: Sequence[str], left_out: Sequence[str], folders: Sequence[str], began: float
) -> None:
    """Keep what was found; where nothing can be written it is looked for again the next time.

    Args:
        folders: all that were looked into.
        began: `time.time()` before the first of them was.
    """
    states = _states(folders)
    if states is None or states[:, 1].max(initial=0) > (began - _SETTLED) * 1e9:
        return
    place = _place(root)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(place) as aside, aside.open("wb") as file:
            np.savez(
                file,
                format=np.array(_FORMAT),
                folders=joined(folders),
                states=states,
                paths=joined(paths),
                left_out=joined(left_out),
            )
    except (OSError, NotWritten):
        return


