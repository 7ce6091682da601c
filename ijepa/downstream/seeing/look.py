"""`ijepa visualize`: pictures as PNG files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console

from ijepa.disk import written_aside
from ijepa.downstream.seeing.opened import Images, Opened, choose_images, open_networks
from ijepa.downstream.seeing.options import (
    AttentionOptions,
    LookOptions,
    MasksOptions,
    PcaOptions,
    PictureNeighboursOptions,
    PredictorOptions,
)
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
from ijepa.report.progress import telling
from ijepa.train.from_recipe import choose_device
from ijepa.visualize.pca import Basis

_PREDICTED = 16  # images that the predictor's shares of right matches are of, at least
_DIRECTIONS = 64  # images that directions of the patch features are found on, at least


def look(options: LookOptions) -> list[Picture]:
    """Draw what the options ask for and write it into their folder.

    Raises:
        ValueError: sources, images or settings that do not fit together.
        NotWritten: no room.
    """
    if options.count < 1:
        raise ValueError(f"count must be at least 1, got {options.count}")
    drawers: dict[type, Callable[[Any, Console], list[Picture]]] = {
        MasksOptions: _masks,
        PcaOptions: _pca,
        AttentionOptions: _attention,
        PictureNeighboursOptions: _neighbours,
        PredictorOptions: _predictor,
    }
    console = RunConsole()
    with telling(console, "Drawing"):
        pictures = drawers[type(options)](options, console)
    options.out.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        path = options.out / f"{picture.name}.png"
        with written_aside(path) as aside:
            picture.image.save(aside, format="PNG")
        text = f"{path}: {picture.caption}"
        console.print(printable(text), highlight=False, markup=False, soft_wrap=True)
    return pictures


def _open(options: LookOptions, source: str) -> Opened:
    return open_networks(source, choose_device(options.device), options.num_heads)


def _open_several(options: LookOptions, sources: tuple[str, ...], untrained: bool) -> list[Opened]:
    if not sources:
        raise ValueError("no source given: name a run's folder, a checkpoint or a .pth.tar file")
    networks = [_open(options, source) for source in sources]
    if untrained:
        random = networks[0].untrained()
        random.model.to(choose_device(options.device))
        networks.append(random)
    return networks


def _images(options: LookOptions, opened: Opened, count: int, console: Console) -> Images:
    return choose_images(opened, options.images, count, options.seed, console)


def _masks(options: MasksOptions, console: Console) -> list[Picture]:
    opened = _open(options, options.source)
    return picture_masks(opened, _images(options, opened, options.count, console), options.count)


def _pca(options: PcaOptions, console: Console) -> list[Picture]:
    networks = _open_several(options, options.sources, options.random_network)
    images = _images(options, networks[0], max(options.count, _DIRECTIONS), console)
    basis = options.basis or default_basis(networks)
    return [
        picture_pca(
            networks, images, count=options.count, basis=basis,
            remove_position=options.remove_position,
        )
    ]  # fmt: skip


def default_basis(networks: list[Opened]) -> Basis:
    """ "one" for checkpoints of one run, which share a feature space."""
    runs = {opened.folder.resolve().parent if opened.folder else None for opened in networks}
    trained = all(opened.name != "random network" for opened in networks)
    return "one" if len(runs) == 1 and None not in runs and trained else "each"


def _attention(options: AttentionOptions, console: Console) -> list[Picture]:
    if not 0 <= options.place <= 1:
        raise ValueError(f"place must lie in [0, 1], got {options.place}")
    opened = _open(options, options.source)
    images = _images(options, opened, options.count, console)
    return [
        picture_attention(
            opened, images, count=options.count, block=options.block, place=options.place
        )
    ]


def _neighbours(options: PictureNeighboursOptions, console: Console) -> list[Picture]:
    networks = _open_several(options, options.sources, options.random_network)
    images = _images(options, networks[0], max(options.gallery, options.count + 1), console)
    return [picture_neighbours(networks, images, queries=options.count)]


def _predictor(options: PredictorOptions, console: Console) -> list[Picture]:
    opened = _open(options, options.source)
    images = _images(options, opened, max(options.count, _PREDICTED), console)
    return [picture_predictor(opened, images, count=options.count)]
