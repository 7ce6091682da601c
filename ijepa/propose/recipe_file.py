"""Choices as a recipe file: TOML, with the reason beside each setting."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ijepa.disk import write_whole
from ijepa.propose.choices import Choice

_ALIGNED = 36  # longer settings, paths mostly, push their reason to the right
_ORDER = ("model", "masks", "data", "train", "schedule", "optim", "monitor")


def recipe_text(head: Sequence[str], choices: Iterable[Choice]) -> str:
    """The file's text.

    Args:
        head: lines that stand above it, as comments.
    """
    tables: dict[str, list[tuple[str, str]]] = {table: [] for table in _ORDER}
    for choice in choices:
        table, key = choice.key.split(".")
        tables[table].append((f"{key} = {_toml(choice.value)}", choice.reason))
    lengths = (len(setting) for lines in tables.values() for setting, _ in lines)
    width = max(length for length in lengths if length <= _ALIGNED)
    parts = ["\n".join(f"# {line}" for line in head)]
    for table, lines in tables.items():
        if lines:
            settings = [f"{setting:<{width}}  # {reason}" for setting, reason in lines]
            parts.append("\n".join([f"[{table}]", *settings]))
    return "\n\n".join(parts) + "\n"


def write_beside_others(text: str, folder: Path, name: str) -> Path:
    """Write `name`.toml, or `name`-2.toml and so on: a file that is there is somebody's.

    Raises:
        NotWritten: there is no room, or the folder may not be written.
    """
    number, path = 1, folder / f"{name}.toml"
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}.toml"
    write_whole(path, text)
    return path


def recipe_name(path: str) -> str:
    """What to call a recipe for the images of a folder."""
    name = Path(path).expanduser().absolute().resolve().name
    kept = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name)
    return kept.strip("-_")[:60] or "images"


def _toml(value: Any) -> str:
    """A string, number, truth value or list of them."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)
