"""Embedding a folder of images from the command line, and looking for neighbours in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console

from ijepa.data import folder_source
from ijepa.data.decode import ImageError
from ijepa.data.views import Squash, Transform
from ijepa.disk import written_aside
from ijepa.downstream.embed import Embedding, embed_source
from ijepa.downstream.feature_files import FEATURES, read_features
from ijepa.downstream.neighbours import nearest
from ijepa.downstream.options import EmbedOptions, EncoderOptions, NeighboursOptions
from ijepa.evaluate.pretrained import PretrainedEncoder, evaluation_crop
from ijepa.interop import load_pretrained
from ijepa.report.console import RunConsole
from ijepa.train import distributed
from ijepa.train.from_recipe import choose_device
from ijepa.visualize.neighbours import draw_neighbours


def open_encoder(source: str, options: EncoderOptions, device: torch.device) -> PretrainedEncoder:
    """The encoder that the options name, on its device."""
    return load_pretrained(
        source, network=options.network, num_heads=options.num_heads, device=device
    )


def transform_at(encoder: PretrainedEncoder, side: int | None) -> Transform:
    """What the encoder looks at, at another size where one is given.

    Raises:
        ValueError: the size is not one of whole patches.
    """
    if side is None:
        return encoder.transform
    size = (side, side)
    encoder.check_size(size)
    if isinstance(encoder.transform, Squash):
        return dataclasses.replace(encoder.transform, size=size)
    return evaluation_crop(size)


def embed_folder(options: EmbedOptions) -> None:
    """`ijepa embed`: features of a folder's images into another folder."""
    device = distributed.start(choose_device(options.encoder.device))
    try:
        console = RunConsole() if distributed.is_main() else None
        encoder = open_encoder(options.source, options.encoder, device)
        source = folder_source(options.folder, channels=encoder.config.channels, cache_bytes=0)
        _check_apart(options.out, options.folder)
        root = Path(options.folder).expanduser()
        embedding = Embedding(
            options.layers,
            transform_at(encoder, options.encoder.image_size),
            options.encoder.batch_size,
            options.encoder.precision,
            options.encoder.workers,
        )
        about = {
            "source": str(Path(options.source).expanduser().resolve()),
            "network": options.encoder.network,
            "num_heads": options.encoder.num_heads,
            "image_size": options.encoder.image_size,
            "folder": str(root.resolve()),
        }

        def name_of(index: int) -> str:
            return str(Path(source.name(index)).relative_to(root))

        done = embed_source(
            encoder, source, options.out, embedding, about=about, name_of=name_of, console=console
        )
        if console is not None and done is not None:
            rate = done.images_per_second
            speed = "" if rate is None else f", {rate:,.0f} a second"
            _say(console, f"{done.rows:,} images{speed}: {options.out / FEATURES}")
            _tell_unreadable(console, done.unreadable)
    except Exception as error:
        distributed.leave(f"{type(error).__name__}: {error}")
        raise
    finally:
        distributed.stop()


def show_neighbours(options: NeighboursOptions) -> None:
    """`ijepa neighbours`: print the nearest images, and draw them.

    Raises:
        ValueError: no such features, an encoder other than theirs, or an unreadable query.
    """
    console = RunConsole()
    features, names, described = read_features(options.embedded)
    encoder = _encoder_of(described, options)
    embedded_at = transform_at(encoder, described.get("image_size"))
    encoder.transform = embedded_at
    try:
        pixels = encoder.preprocess(options.query)
    except ImageError as error:
        raise ValueError(f"the query cannot be read: {error}") from None
    query = encoder.embed(pixels, described["layers"])[0].cpu().numpy()
    root = Path(described["folder"])
    itself = options.query.expanduser().resolve()
    found = [
        neighbour
        for neighbour in nearest(features, query, options.count + 1)
        if (root / names[neighbour.row]).resolve() != itself
    ][: options.count]
    for place, neighbour in enumerate(found, start=1):
        _say(console, f"{place:3d}  {neighbour.cosine:+.3f}  {names[neighbour.row]}")
    out = options.out or options.embedded / "neighbours.png"
    tiles = [(_picture(root / names[n.row]), f"{n.cosine:+.2f} {names[n.row]}") for n in found]
    with written_aside(out) as aside:
        draw_neighbours(Image.open(options.query), tiles).save(aside, format="PNG")
    _say(console, f"drawn: {out}")


def _encoder_of(described: dict[str, Any], options: NeighboursOptions) -> PretrainedEncoder:
    """The encoder that made the features."""
    source = options.source or described["source"]
    encoder = load_pretrained(
        source,
        network=described["network"],
        num_heads=described["num_heads"],
        device=choose_device(options.device),
    )
    if encoder.fingerprint() != described["encoder"]:
        raise ValueError(
            f"{source} is not the encoder that made the features of {options.embedded}: it has "
            "trained on since, say. Give the right one with --source, or embed the folder again"
        )
    return encoder


def _check_apart(out: Path, folder: Path) -> None:
    """Raise ValueError where the pictures drawn into `out` would be counted among the images."""
    if out.expanduser().resolve().is_relative_to(Path(folder).expanduser().resolve()):
        raise ValueError(f"--out {out} lies in the folder of the images: choose another place")


def _tell_unreadable(console: Console, unreadable: dict[str, str]) -> None:
    if unreadable:
        _say(console, f"{len(unreadable)} could not be read, all named in embed.json:")
    for name, reason in list(unreadable.items())[:5]:
        _say(console, f"  {name}: {reason}")


def _picture(path: Path) -> Image.Image | None:
    """The picture of a neighbour, None where its file is gone or damaged."""
    try:
        with Image.open(path) as picture:
            picture.draft("RGB", (320, 320))  # a JPEG is reduced while it is decoded
            return picture.copy()
    except OSError:
        return None


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
