"""Settings of runs side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_MOST_LETTERS = 400  # of a value: what is longer is nothing that the program wrote


def flat_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """{"train": {"steps": 5}} -> {"train.steps": "5"}; values as JSON, text without quotes."""
    found = {}
    for table, entries in settings.items():
        if isinstance(entries, Mapping):
            for key, value in entries.items():
                found[f"{table}.{key}"] = _spoken(value)
        else:
            found[str(table)] = _spoken(entries)
    return found


def differing_settings(flat: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """[name, value in each run] of the settings that are not the same in all; "" where missing."""
    names = sorted({name for settings in flat for name in settings})
    rows = [[name, *(settings.get(name, "") for settings in flat)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def _spoken(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _MOST_LETTERS else text[:_MOST_LETTERS] + " ..."
