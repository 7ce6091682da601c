"""A grid of one's own: settings and the values that each takes."""

from __future__ import annotations

import itertools
import tomllib
from typing import Any

from ijepa.ablate.tables import Comparison, Variant
from ijepa.recipes import check_setting

_MOST_VARIANTS = 1000


def grid_comparison(given: list[str]) -> Comparison:
    """Every combination of "table.key=value,value,...".

    Values are written as in TOML; what is no TOML is text: masks.strategy=block,random. Values that
    hold commas are lists: masks.target_scale=[0.1,0.2],[0.2,0.3].

    Raises:
        ValueError: nothing given, an unknown or repeated setting, one without values, or too many
            combinations.
    """
    if not given:
        raise ValueError("a sweep needs at least one --vary table.key=value,value")
    axes: dict[str, list[Any]] = {}
    for text in given:
        key, written = _split(text)
        if key in axes:
            raise ValueError(f"{key} is given twice")
        axes[key] = [_value(part) for part in _parts(written)]
    count = 1
    for values in axes.values():
        count *= len(values)
    if count > _MOST_VARIANTS:
        raise ValueError(f"{count:,} combinations are more than {_MOST_VARIANTS:,}: vary less")
    variants = []
    for chosen in itertools.product(*axes.values()):
        settings = dict(zip(axes, chosen, strict=True))
        name = ", ".join(f"{key.partition('.')[2]} {_spoken(v)}" for key, v in settings.items())
        variants.append(Variant(name, settings))
    return Comparison("sweep", ", ".join(axes), tuple(variants))


def setting_and_value(text: str) -> tuple[str, Any]:
    """ "train.steps=500" -> ("train.steps", 500).

    Raises:
        ValueError: an unknown setting, or no value.
    """
    key, value = _split(text)
    return key, _value(value)


def _split(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    key = key.strip().removeprefix("--").replace("-", "_")
    if not equals or not value.strip():
        raise ValueError(f"{text!r} names no value: write {key or 'table.key'}=value")
    check_setting(key)
    return key, value.strip()


def _parts(text: str) -> list[str]:
    """Split at commas that are in no brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _spoken(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_spoken, value))})"
    return f"{value:g}" if isinstance(value, float) else str(value)
