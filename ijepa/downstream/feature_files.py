"""Features on disk, in a folder that is whole at every moment and can grow past memory.

    features.npy    (n, D) float32; np.load(mmap_mode="r") opens it, also while it grows
    names.txt       the n images, one a line
    embed.json      what the features are of, unreadable images, how far it is: the commit record

Rows and names are appended and flushed, then embed.json is replaced, then the header of
features.npy tells the new number of rows. Whoever is killed in between leaves rows that
nothing counts; they are cut off when the work goes on.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ijepa.disk import not_written, write_whole
from ijepa.train.run_lock import RunLock
from ijepa.versions import versions

FEATURES, NAMES, DESCRIPTION = "features.npy", "names.txt", "embed.json"
FORMAT = "ijepa-features"
_HEADER_BYTES = 128  # room for any number of rows


class FeatureFiles:
    """Appends features to a folder, from the start or where somebody stopped.

    Args:
        folder: made where it is missing.
        identity: JSON values that decide about the features; those of another identity are not
            gone on with.
        width: D.
        about: further JSON values for embed.json, free to differ when the work goes on.

    Attributes:
        done: images dealt with so far, readable or not.
        rows: those of them with features.
        complete: whether these were all.

    Raises:
        ValueError: the folder holds something else, or features of another identity; or another
            process writes into it.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        width: int,
        about: Mapping[str, Any] | None = None,
    ):
        self.folder, self.width, self._about = folder, width, dict(about or {})
        self._identity = json.loads(json.dumps(identity))  # as it will be read
        self.done = self.rows = 0
        self.complete = False
        self._names_bytes = 0
        self.unreadable: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = RunLock(folder, "written")
        try:
            if (folder / DESCRIPTION).exists():
                self._take_up()
            elif (folder / FEATURES).exists() or (folder / NAMES).exists():
                raise ValueError(
                    f"{folder} holds {FEATURES} or {NAMES} without {DESCRIPTION}: choose another "
                    "folder, or remove them"
                )
            else:  # first of all: whoever is killed now leaves a folder that can be gone on with
                self._describe()
            self._open()
        except BaseException:
            self._lock.release()
            raise

    def append(
        self, features: np.ndarray, names: Sequence[str], unreadable: Mapping[str, str]
    ) -> None:
        """The next images: rows (b, D) float32 of those that could be read, and their names.

        Nothing is certain to stay before `commit`.
        """
        if features.dtype != np.float32 or features.shape != (len(names), self.width):
            raise ValueError(
                f"features must be float32 of shape ({len(names)}, {self.width}), got "
                f"{features.dtype} {features.shape}"
            )
        lines = [_one_line(name) + b"\n" for name in names]
        try:
            self._features.write(np.ascontiguousarray(features).tobytes())
            self._names.write(b"".join(lines))
        except OSError as error:
            raise not_written(FEATURES, self.folder, error) from None
        self.rows += len(names)
        self._names_bytes += sum(map(len, lines))
        self.unreadable |= unreadable
        self.done += len(names) + len(unreadable)

    def commit(self, complete: bool = False) -> None:
        """Put what was appended on the disk for good."""
        self.complete = complete
        try:
            for file in (self._features, self._names):
                file.flush()
                os.fsync(file.fileno())
            self._describe()
            self._write_header()
            if complete:
                os.fsync(self._features.fileno())
        except OSError as error:
            raise not_written(FEATURES, self.folder, error) from None

    def close(self) -> None:
        """Close the files and let others write; what was not committed will be done again."""
        self._features.close()
        self._names.close()
        self._lock.release()

    def _describe(self) -> None:
        described = {
            "format": FORMAT,
            "complete": self.complete,
            **self._about,
            **self._identity,
            "done": self.done,
            "rows": self.rows,
            "width": self.width,
            "names_bytes": self._names_bytes,
            "unreadable_count": len(self.unreadable),
            "unreadable": self.unreadable,
            "versions": versions(),
        }
        write_whole(self.folder / DESCRIPTION, json.dumps(described, indent=1))

    def _take_up(self) -> None:
        before = read_description(self.folder)
        for key, value in self._identity.items():
            if before.get(key) != value:
                raise ValueError(
                    f"{self.folder} holds other features: {key} is {before.get(key)!r} there and "
                    f"{value!r} here; choose another folder, or remove it"
                )
        self.done, self.rows = int(before["done"]), int(before["rows"])
        self._names_bytes = int(before["names_bytes"])
        self.complete = bool(before["complete"])
        self.unreadable = dict(before["unreadable"])
        wanted = {FEATURES: self._features_bytes(), NAMES: self._names_bytes} if self.rows else {}
        for name, size in wanted.items():
            path = self.folder / name
            found = path.stat().st_size if path.exists() else 0
            if found < size:
                raise ValueError(
                    f"{path} is damaged: {found} bytes, {DESCRIPTION} counts {size}; remove "
                    f"{self.folder} to begin again"
                )

    def _open(self) -> None:
        for name in (FEATURES, NAMES):
            (self.folder / name).touch()
        self._features = (self.folder / FEATURES).open("r+b")
        self._names = (self.folder / NAMES).open("r+b")
        self._names.truncate(self._names_bytes)
        self._names.seek(self._names_bytes)
        self._features.truncate(self._features_bytes())
        self._write_header()
        self._features.seek(0, os.SEEK_END)

    def _features_bytes(self) -> int:
        return _HEADER_BYTES + 4 * self.rows * self.width

    def _write_header(self) -> None:
        os.pwrite(self._features.fileno(), npy_header(self.rows, self.width), 0)


def npy_header(rows: int, width: int) -> bytes:
    """The first 128 bytes of an .npy file of (rows, width) float32."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {width}), }}"
    start = b"\x93NUMPY\x01\x00" + struct.pack("<H", _HEADER_BYTES - 10)
    return start + text.ljust(_HEADER_BYTES - 11).encode() + b"\n"


def read_description(folder: Path) -> dict[str, Any]:
    """embed.json of a folder.

    Raises:
        ValueError: there is none, or something else.
    """
    path = folder / DESCRIPTION
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no {DESCRIPTION}: give a folder that `ijepa embed` wrote"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by `ijepa embed`")
    return described


def read_features(folder: Path) -> tuple[np.ndarray, list[str], dict[str, Any]]:
    """Features (n, D) as a map of the file, their images' names, and embed.json.

    Raises:
        ValueError: see `read_description`; or rows and names that are not as many.
    """
    described = read_description(folder)
    rows = described["rows"]
    features = np.load(folder / FEATURES, mmap_mode="r")[:rows]
    names = (folder / NAMES).read_bytes()[: described["names_bytes"]]
    lines = names.decode("utf-8", "surrogateescape").split("\n")[:-1]
    if not len(features) == len(lines) == rows:
        raise ValueError(
            f"{folder} is damaged: {len(features)} rows and {len(lines)} names, {rows} are counted"
        )
    return features, lines, described


def _one_line(name: str) -> bytes:
    """A file's name as one line of names.txt."""
    return name.replace("\n", "\\n").encode("utf-8", "surrogateescape")
