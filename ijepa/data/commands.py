"""`ijepa data shard | check`: images into tar files, and what a set of images holds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tyro.conf import Positional, arg

from ijepa.data.check import Findings, check_images, contact_sheet
from ijepa.data.images_at import images_at
from ijepa.data.shards.write import write_shards
from ijepa.disk import readable_bytes, written_aside
from ijepa.printable import printable

_NAMED = 20
USAGE = """\
ijepa data shard FOLDER OUT [options]   images as tar files of the WebDataset layout
ijepa data check PATH [options]         counts, sizes, unreadable files, colours, a contact sheet

FOLDER and PATH are folders of images, tar files, folders of tar files, or lists (.csv, .txt).
Options of each: ijepa data shard --help
"""


@dataclass(frozen=True)
class ShardOptions:
    """The images of FOLDER as tar files in OUT, in an order drawn from the seed.

    Members are the files as they were, and a number for their class where the images lie in a
    folder a class. Images that cannot be read are left out and named; the exit status is then 1.
    """

    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """of images, or a list of them"""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """a new or empty folder"""
    megabytes: int = 512
    """of a tar file, at most"""
    seed: int = 0
    """of the order"""


@dataclass(frozen=True)
class CheckOptions:
    """Decodes the images of PATH and says what they are; exit status 1 where some cannot be read.

    image_mean and image_std are what a recipe's model.image_mean and model.image_std would be.
    """

    path: Annotated[Positional[Path], arg(metavar="PATH")]
    """a folder of images, tar files, or a list"""
    limit: int | None = None
    """look at this many, drawn at random; default: all"""
    sheet: Path = Path("contact-sheet.png")
    """where up to 64 of them are drawn"""


def data_command(arguments: Sequence[str]) -> int:
    """`ijepa data shard FOLDER OUT | check PATH`; returns the exit status.

    Raises:
        ValueError: no images, an option out of its range, or a folder that is not empty.
        NotWritten: no room.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    command, *rest = arguments
    console = Console()
    if command == "shard":
        return _shard(tyro.cli(ShardOptions, args=rest, prog="ijepa data shard"), console)
    if command == "check":
        return _check(tyro.cli(CheckOptions, args=rest, prog="ijepa data check"), console)
    raise ValueError(f"ijepa data takes shard or check, got {command!r}")


def _shard(options: ShardOptions, console: Console) -> int:
    if options.megabytes < 1:
        raise ValueError(f"--megabytes must be at least 1, got {options.megabytes}")
    source = images_at(options.folder, cache_bytes=0)
    _tell(console, "left out, being no readable files", source.left_out)
    with _bar(console, "Writing", len(source)) as told:
        written = write_shards(
            source,
            options.out,
            shard_bytes=options.megabytes * 1_000_000,
            seed=options.seed,
            told=told,
        )
    size = sum((options.out / name).stat().st_size for name in written.archives)
    _tell(console, "cannot be read and are not among them", written.unreadable)
    _say(
        console,
        f"{written.images:,} images in {len(written.archives):,} tar files, {readable_bytes(size)}:"
        f" train on them with --data.path {options.out}",
    )
    return 1 if written.unreadable else 0


def _check(options: CheckOptions, console: Console) -> int:
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {options.limit}")
    source = images_at(options.path, cache_bytes=0)
    count = len(source) if options.limit is None else min(options.limit, len(source))
    with _bar(console, "Decoding", count) as told:
        found = check_images(source, limit=options.limit, told=told)
    names, labels = source.class_names.get("class"), source.labels.get("class")
    console.print(_report(printable(str(options.path)), found, names, labels))
    _tell(console, "left out, being no readable files", source.left_out)
    _tell(console, "cannot be read", found.unreadable)
    if found.tiles:
        with written_aside(options.sheet) as aside:
            contact_sheet(found.tiles).save(aside)
        _say(console, f"{len(found.tiles)} of them are drawn in {options.sheet}")
    return 1 if found.unreadable or source.left_out else 0


def _report(
    path: str, found: Findings, names: tuple[str, ...] | None, labels: np.ndarray | None
) -> Table:
    table = Table(title=path, show_header=False)
    table.add_column("what")
    table.add_column("figure", justify="right")
    table.add_row("images", f"{found.images:,}")
    if found.looked_at < found.images:
        table.add_row("looked at, drawn at random", f"{found.looked_at:,}")
    table.add_row("cannot be read", f"{len(found.unreadable):,}")
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in found.extensions.most_common(5))
    table.add_row("named", kinds)
    if names is not None and labels is not None:
        counts = np.bincount(labels, minlength=len(names))
        table.add_row("classes", f"{len(names):,}, of {counts.min():,} to {counts.max():,} images")
    if found.heights:
        sizes = np.array([found.widths, found.heights])
        middle = np.median(sizes, axis=1).astype(int)
        smallest = np.argmin(sizes.prod(0))
        largest = np.argmax(sizes.prod(0))
        table.add_row("median width x height", f"{middle[0]} x {middle[1]}")
        table.add_row("smallest", "{} x {}".format(*sizes[:, smallest]))
        table.add_row("largest", "{} x {}".format(*sizes[:, largest]))
        table.add_row("with a side under 32 pixels", f"{found.small:,}")
        table.add_row("without colour", f"{found.grey:,}")
        table.add_row("image_mean", "[" + ", ".join(f"{v:.3f}" for v in found.mean) + "]")
        table.add_row("image_std", "[" + ", ".join(f"{v:.3f}" for v in found.std) + "]")
    return table


@contextlib.contextmanager
def _bar(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar with the time left; yields what to tell it the number done."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


def _tell(console: Console, what: str, lines: Sequence[str]) -> None:
    if not lines:
        return
    more = [f"  and {len(lines) - _NAMED:,} more"] if len(lines) > _NAMED else []
    shown = [f"{len(lines):,} {what}:", *(f"  {line}" for line in lines[:_NAMED]), *more]
    _say(console, "\n".join(shown))


def _say(console: Console, text: str) -> None:
    """As it is: names of files may look like anything to a terminal."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
