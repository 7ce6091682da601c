"""Where the images of a tar file lie in it: found once, and kept for as long as the file stays.

Nothing is ever unpacked, so names in an archive lead nowhere: they only tell images apart. Links,
devices and FIFOs in it are left out and named, and so is what a damaged archive has lost.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ijepa.data.extensions import EXTENSIONS
from ijepa.data.packed_strings import joined, split
from ijepa.data.regular_files import MAX_BYTES, open_regular_file
from ijepa.disk import NotWritten, written_aside
from ijepa.printable import printable

_MAX_LABEL_BYTES = 64
_MAX_NAMED = 1000  # of what is left out of one archive
_FORMAT = 1
_NO_LABEL = -1


@dataclass(frozen=True)
class TarIndex:
    """The images of one archive, in its order.

    Attributes:
        names: of the members.
        offsets, sizes: (n,) int64 bytes of each image's content.
        labels: (n,) int64 class numbers of the members' `.cls` files, -1 without one.
        left_out: "archive/member: why" of what is no image that can be read.
        file_size, file_time: of the archive, bytes and nanoseconds.
    """

    names: list[str]
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    left_out: list[str]
    file_size: int
    file_time: int


def tar_index(archive: Path, cache: Path | None) -> TarIndex:
    """The index of an archive, from `cache` where that knows a file of this size and time.

    Args:
        cache: a folder, made where it is missing; None keeps nothing. Where nothing can be
            written there the index is made again the next time.

    Raises:
        OSError: the archive cannot be read, or is no regular file.
    """
    state = os.stat(archive)
    kept = None
    if cache is not None:
        place = hashlib.sha256(os.fsencode(archive.resolve())).hexdigest()[:32]
        kept = cache / f"{place}.npz"
        found = _load(kept)
        if found is not None and (found.file_size, found.file_time) == _identity(state):
            return found
    index = _scan(archive)
    if kept is not None:
        _keep(index, kept)
    return index


def _identity(state: os.stat_result) -> tuple[int, int]:
    return state.st_size, state.st_mtime_ns


def _scan(archive: Path) -> TarIndex:
    """Read the headers of all members; of their contents, labels alone."""
    names: list[str] = []
    places: list[tuple[int, int]] = []
    keys: list[str] = []
    labels: dict[str, int] = {}
    left_out: list[str] = []
    more = 0

    def leave_out(name: str, why: str) -> None:
        nonlocal more
        if len(left_out) < _MAX_NAMED:
            left_out.append(f"{printable(f'{archive}/{name}')}: {why}")
        else:
            more += 1

    descriptor = open_regular_file(archive)
    with open(descriptor, "rb", buffering=4096) as file:
        state = os.fstat(descriptor)
        try:
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  # no compression: pread
        except tarfile.TarError as error:
            leave_out("", f"no tar file: {error}")
            return _gathered(names, places, [], left_out, state)
        while True:
            position = tar.offset
            try:
                member = tar.next()
            except (tarfile.TarError, ValueError, OverflowError) as error:
                leave_out("", f"damaged at byte {position:,}: {error}; what follows is lost")
                break
            if member is None:  # also where the next header is none: tarfile does not tell
                if os.pread(descriptor, tarfile.BLOCKSIZE, position) != bytes(tarfile.BLOCKSIZE):
                    leave_out("", f"damaged at byte {position:,}: what follows is lost")
                break
            tar.members = []  # type: ignore[attr-defined]  # it would keep them all
            name = member.name
            extension = os.path.splitext(name)[1].lower()
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                leave_out(name, _kind(member))
            elif member.offset_data + member.size > state.st_size:
                leave_out(name, "cut short: the archive ends within it")
                break
            elif extension == ".cls":
                label = _label(descriptor, member)
                if label is None:
                    leave_out(name, "a label must be a whole number from 0 on")
                else:
                    labels[_key(name)] = label
            elif extension in EXTENSIONS and not os.path.basename(name).startswith("."):
                if member.size > MAX_BYTES:
                    leave_out(name, f"{member.size:,} bytes, more than {MAX_BYTES:,}")
                    continue
                names.append(name)
                places.append((member.offset_data, member.size))
                keys.append(_key(name))
        tar.close()
    if more:
        left_out.append(f"{printable(str(archive))}: and {more:,} more")
    numbers = [labels.get(key, _NO_LABEL) for key in keys]
    return _gathered(names, places, numbers, left_out, state)


def _gathered(names, places, labels, left_out, state: os.stat_result) -> TarIndex:
    offsets, sizes = np.array(places, dtype=np.int64).reshape(-1, 2).T.copy()
    numbers = np.array(labels, dtype=np.int64)
    return TarIndex(names, offsets, sizes, numbers, left_out, *_identity(state))


def _kind(member: tarfile.TarInfo) -> str:
    if member.issym() or member.islnk():
        return "a link"
    return "a device" if member.isdev() and not member.isfifo() else "no file"


def _key(name: str) -> str:
    """What the files of one sample have in common: the path up to the name's first dot."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _label(descriptor: int, member: tarfile.TarInfo) -> int | None:
    if member.size > _MAX_LABEL_BYTES:
        return None
    text = os.pread(descriptor, member.size, member.offset_data).decode("ascii", "replace").strip()
    return int(text) if text.isdecimal() and len(text) < 10 else None


def _keep(index: TarIndex, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside, aside.open("wb") as file:
            np.savez(
                file,
                format=np.array(_FORMAT),
                identity=np.array([index.file_size, index.file_time], dtype=np.int64),
                offsets=index.offsets,
                sizes=index.sizes,
                labels=index.labels,
                names=joined(index.names),
                left_out=joined(index.left_out),
            )
    except (OSError, NotWritten):
        return  # an index that is not kept is made again: said where `cache` is described


def _load(path: Path) -> TarIndex | None:
    """A kept index, None where there is none that can be used."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            if int(kept["format"]) != _FORMAT:
                return None
            identity = kept["identity"].tolist()
            names, left_out = split(kept["names"]), split(kept["left_out"])
            offsets, sizes, labels = (
                kept[name].astype(np.int64) for name in ("offsets", "sizes", "labels")
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if any(array.shape != (len(names),) for array in (offsets, sizes, labels)):
        return None
    return TarIndex(names, offsets, sizes, labels, left_out, *identity)
