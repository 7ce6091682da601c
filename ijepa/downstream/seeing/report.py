"""`ijepa report`: what is in runs' folders, gathered onto one page."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console

from ijepa.disk import readable_bytes, write_whole
from ijepa.downstream.seeing.opened import Images, Opened, choose_images, open_networks
from ijepa.downstream.seeing.options import ReportOptions
from ijepa.downstream.seeing.pictures import (
    Picture,
    picture_attention,
    picture_masks,
    picture_neighbours,
    picture_pca,
    picture_predictor,
)
from ijepa.printable import printable
from ijepa.report.console import RunConsole
from ijepa.report.metrics import read_metrics
from ijepa.report.page.html import PagePicture, PageRun, render_page
from ijepa.report.probes import read_probes
from ijepa.report.progress import telling
from ijepa.train.checkpoint import CheckpointError, find_checkpoint, holds_checkpoint, read_metadata
from ijepa.train.from_recipe import choose_device
from ijepa.train.run_folder import RECIPE
from ijepa.versions import installed_versions

DEFAULT_NAME = "report.html"
_LARGEST_PNG = 150_000  # bytes: what is larger is written as JPEG
_SMALLEST_GALLERY, _SHOWN, _PREDICTED = 80, 5, 16  # images


def write_page(options: ReportOptions) -> Path:
    """Gather the runs and write the page.

    Raises:
        ValueError: no run, or a folder that is none.
        NotWritten: no room.
    """
    if not options.runs:
        raise ValueError("ijepa report needs at least one run's folder")
    console = RunConsole()
    folders = [run_folder(name) for name in options.runs]
    names = distinct_names(folders)
    runs = [read_run_folder(f, name) for f, name in zip(folders, names, strict=True)]
    pictures: list[PagePicture] = []
    if not options.no_pictures:
        for number, folder in enumerate(folders):
            if not holds_checkpoint(folder):
                note = "no checkpoint yet, so no pictures"
                runs[number] = dataclasses.replace(runs[number], notes=[*runs[number].notes, note])
        pictures, notes = _pictures(options, folders, names, console)
        for number, note in notes:
            noted = [*runs[number].notes, note]
            runs[number] = dataclasses.replace(runs[number], notes=noted)
    when = f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
    made = f"Made by ijepa {installed_versions()['ijepa']}, {when}."
    out = options.out or folders[0] / DEFAULT_NAME
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, render_page(runs, pictures, made))
    size = readable_bytes(out.stat().st_size)
    console.print(printable(f"{out}: {size}"), highlight=False, markup=False, soft_wrap=True)
    return out


def run_folder(name: str) -> Path:
    """The folder of a run.

    Raises:
        ValueError: there is nothing, or nothing of a run, there.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{name} is no folder: give that of a run, as runs/shapes-tiny-001")
    if not ((folder / RECIPE).exists() or holds_checkpoint(folder)):
        raise ValueError(f"{name} holds no run: neither {RECIPE} nor checkpoints are in it")
    return folder


def distinct_names(folders: list[Path]) -> list[str]:
    """The folders' own names, with as many of their parents as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(path[-1:])} ({number + 1})" for number, path in enumerate(parts)]


def read_run_folder(folder: Path, name: str) -> PageRun:
    """What a run's folder holds, whatever is missing or damaged noted."""
    notes: list[str] = []

    def read(what: str, reader: Callable[[], Any]) -> Any:
        try:
            return reader()
        except (OSError, ValueError) as error:
            notes.append(f"{what} cannot be read: {error}")
            return None

    metadata: Mapping[str, Any] = {}
    if holds_checkpoint(folder):
        metadata = read("the checkpoint", lambda: read_metadata(find_checkpoint(folder))) or {}
    settings = metadata.get("config")
    if not isinstance(settings, Mapping):
        settings = read("recipe.json", lambda: _object(folder / RECIPE))
    metrics = read("metrics.jsonl", lambda: read_metrics(folder)) or []
    step = metadata.get("step")
    return PageRun(
        name,
        [line for line in metrics if isinstance(line, Mapping)],
        settings,
        read("probes.json", lambda: read_probes(folder)),
        _facts(metadata.get("versions")),
        _facts(metadata.get("machine")),
        step if isinstance(step, int) else None,
        notes,
    )


def _object(path: Path) -> Mapping[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds no JSON object")
    return found


def _facts(found: Any) -> dict[str, str]:
    """Names and values as text, of a JSON object."""
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, Mapping) else {}


def _pictures(
    options: ReportOptions, folders: list[Path], names: list[str], console: Console
) -> tuple[list[PagePicture], list[tuple[int, str]]]:
    """The pictures of all runs with a checkpoint, and (run, what could not be drawn)."""
    device = choose_device(options.device)
    notes: list[tuple[int, str]] = []
    networks: list[Opened] = []
    for number, (folder, name) in enumerate(zip(folders, names, strict=True)):
        if not holds_checkpoint(folder):
            continue
        try:
            opened = open_networks(str(folder), device)
        except (CheckpointError, ValueError) as error:
            notes.append((number, f"no pictures: {error}"))
            continue
        networks.append(dataclasses.replace(opened, name=name))
    if not networks:
        return [], notes
    try:
        gallery = max(options.gallery, _SMALLEST_GALLERY)
        images = choose_images(networks[0], options.images, gallery, options.seed, console)
    except (OSError, ValueError) as error:
        return [], [*notes, (0, f"no pictures: its images are not there: {error}")]
    found: list[PagePicture] = []
    drawers = _drawers(networks, images, device)
    for section, number, draw in drawers:
        with telling(console, f"Drawing {section.lower()}"):
            try:
                found += [_encoded(section, picture) for picture in draw()]
            except ValueError as error:
                notes.append((number, f"{section} is not drawn: {error}"))
    return found, notes


def _drawers(
    networks: list[Opened], images: Images, device: torch.device
) -> list[tuple[str, int, Callable[[], list[Picture]]]]:
    """(section, run that is noted where it fails, what draws its pictures)."""
    untrained = networks[0].untrained()
    untrained.model.to(device)
    shown = [*networks, untrained]
    few = dataclasses.replace(images, numbers=images.numbers[:_SMALLEST_GALLERY])
    drawers: list[tuple[str, int, Callable[[], list[Picture]]]] = [
        ("PCA maps", 0, partial(_pca_maps, shown, few)),
        ("Nearest neighbours", 0, partial(_neighbours, shown, images)),
    ]
    sixteen = dataclasses.replace(images, numbers=images.numbers[:_PREDICTED])
    for number, opened in enumerate(networks):
        suffix = f": {opened.name}" if len(networks) > 1 else ""
        of_each: dict[str, Callable[[Opened, Images], list[Picture]]] = {
            "Attention": lambda of, looked: [picture_attention(of, looked)],
            "Predictor": lambda of, looked: [picture_predictor(of, looked)],
        }
        if number == 0 or opened.masks != networks[0].masks:
            of_each["Masks"] = picture_masks
        for section, draw in of_each.items():
            drawers.append((section, number, partial(_named, draw, opened, sixteen, suffix)))
    return sorted(drawers, key=lambda drawer: drawer[0] == "Masks")


def _pca_maps(networks: list[Opened], images: Images) -> list[Picture]:
    return [
        picture_pca(networks, images, basis="each", remove_position=remove)
        for remove in (False, True)
    ]


def _neighbours(networks: list[Opened], images: Images) -> list[Picture]:
    return [picture_neighbours(networks, images, queries=_SHOWN)]


def _named(
    draw: Callable[[Opened, Images], list[Picture]], opened: Opened, images: Images, suffix: str
) -> list[Picture]:
    """A run's pictures, their titles with the run's name where there are several."""
    pictures = draw(opened, images)
    return [dataclasses.replace(picture, title=picture.title + suffix) for picture in pictures]


def _encoded(section: str, picture: Picture) -> PagePicture:
    """As PNG, or as JPEG where that is too large."""
    image = picture.image.convert("RGB")
    data, kind = _saved(image, "png"), "png"
    if len(data) > _LARGEST_PNG:
        data, kind = _saved(image, "jpeg"), "jpeg"
    return PagePicture(section, picture.title, picture.caption, kind, data, image.size)


def _saved(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    if kind == "png":
        image.save(stream, format="PNG", optimize=True)
    else:
        image.save(stream, format="JPEG", quality=88)
    return stream.getvalue()
