"""A folder of images as tar files of the WebDataset layout.

Members are KEY.jpg and so on as they were, and KEY.cls with the class number where the source has
labels; KEY is the image's number. Images lie in an order drawn from a seed, so that what reads the
archives one after the other sees no class at a time.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ijepa.counter_rng import derive_keys, random_bits
from ijepa.data.decode import ImageError
from ijepa.data.regular_files import read_regular_file
from ijepa.data.shards.source import CLASSES
from ijepa.data.sources import FileSource
from ijepa.disk import write_whole, written_aside
from ijepa.printable import printable

_ORDER_STREAM = 0x54A2D
_BLOCK = 512


@dataclass
class Written:
    """What was written.

    Attributes:
        archives: their names.
        images: in all of them.
        unreadable: "path: why" of the images that are not among them.
    """

    archives: list[str] = field(default_factory=list)
    images: int = 0
    unreadable: list[str] = field(default_factory=list)


def write_shards(
    source: FileSource,
    out: Path,
    *,
    shard_bytes: int = 512 << 20,
    seed: int = 0,
    told: Callable[[int], None] = lambda images: None,
) -> Written:
    """Write the images of `source` into `out`/shard-00000.tar, ...

    What is written is a function of the images, `shard_bytes` and `seed` alone: no times, no
    owners. An archive has its name once it is whole.

    Args:
        out: a new or empty folder.
        shard_bytes: size that an archive does not exceed unless one image does.
        told: how many images have been gone through.

    Raises:
        ValueError: `out` holds files already.
        NotWritten: no room.
    """
    out.mkdir(parents=True, exist_ok=True)
    if any(not name.startswith(".") for name in os.listdir(out)):
        raise ValueError(f"{out} is not empty: give a new folder for the shards")
    written = Written()
    keys = derive_keys(_ORDER_STREAM, seed)
    order = np.argsort(random_bits(keys.reshape(1), len(source))[0], kind="stable")
    labels = source.labels.get("class")
    position = 0
    while position < len(order):
        name = f"shard-{len(written.archives):05d}.tar"
        before = written.images
        with (
            written_aside(out / name) as aside,
            tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            while position < len(order):
                number = int(order[position])
                data = _readable(source, number, written)
                if data is not None:
                    if tar.offset + _room(data) > shard_bytes and written.images > before:
                        break
                    key = f"{written.images:09d}"
                    extension = os.path.splitext(source.name(number))[1].lower()
                    _add(tar, key + extension, data)
                    if labels is not None:
                        _add(tar, f"{key}.cls", str(int(labels[number])).encode())
                    written.images += 1
                position += 1
                told(position)
        if written.images == before:  # none of the images that were left can be read
            (out / name).unlink()
        else:
            written.archives.append(name)
    names = source.class_names.get("class")
    if names is not None:
        write_whole(out / CLASSES, json.dumps(list(names), indent=1))
    return written


def _readable(source: FileSource, number: int, written: Written) -> bytes | None:
    """The file's bytes; of one whose pixels cannot be read None, and a note."""
    try:
        source.open(number).decode(8)
        return read_regular_file(source.name(number))
    except (ImageError, OSError) as error:
        line = f"{printable(source.name(number))}: {error}"
        if line not in written.unreadable[-1:]:
            written.unreadable.append(line)
        return None


def _room(data: bytes) -> int:
    """Bytes that an image and its label take, and the end of the archive."""
    return _BLOCK + -(-len(data) // _BLOCK) * _BLOCK + 2 * _BLOCK + 20 * _BLOCK


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))
