"""The commands that use an encoder: `ijepa embed | neighbours`."""

from __future__ import annotations

from typing import TypeVar

import tyro

from ijepa.downstream.options import EmbedOptions, NeighboursOptions

Options = TypeVar("Options")


def embed_command(arguments: list[str]) -> int:
    """`ijepa embed SOURCE FOLDER --out DIR`."""
    options = _parsed(EmbedOptions, "embed", arguments)
    from ijepa.downstream.embed_folder import embed_folder

    embed_folder(options)
    return 0


def neighbours_command(arguments: list[str]) -> int:
    """`ijepa neighbours DIR QUERY`."""
    options = _parsed(NeighboursOptions, "neighbours", arguments)
    from ijepa.downstream.embed_folder import show_neighbours

    show_neighbours(options)
    return 0


def _parsed(kind: type[Options], command: str, arguments: list[str]) -> Options:
    return tyro.cli(kind, args=arguments, prog=f"ijepa {command}")
