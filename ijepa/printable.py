"""Names of files as people may be shown them."""

from __future__ import annotations


def printable(name: str) -> str:
    r"""A name with escapes, "\n" or "\udcff", for what moves a terminal's cursor, breaks a line or
    is no text in any encoding: files of a downloaded data set may be called anything."""
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in name
    )
