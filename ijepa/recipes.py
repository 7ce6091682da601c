"""Recipes: TOML files to a `Recipe` and back, with overrides.

A file's tables are the fields of `Recipe`. `base = "vitb16"` on top starts from another recipe
and states only what differs; `base = "mine.toml"` is looked up beside the file that says so.
Unknown keys and bad values are refused with what is valid.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

from ijepa.config import Recipe

# What a setting says of another one: of two ways to say one thing the other is cleared, and a path
# is that of a folder.
_IMPLIED: dict[str, tuple[str, Any]] = {
    "train.steps": ("train.epochs", None),
    "train.epochs": ("train.steps", None),
    "schedule.warmup_steps": ("schedule.warmup_epochs", None),
    "schedule.warmup_epochs": ("schedule.warmup_steps", 0),
    "data.path": ("data.source", "folder"),
}


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    files = resources.files("ijepa.configs").iterdir()
    return sorted(Path(file.name).stem for file in files if file.name.endswith(".toml"))


def setting_names() -> list[str]:
    """Every setting as `table.key`, and the top-level `name`."""
    tables = _tables()
    return ["name"] + [
        f"{table}.{field.name}"
        for table, config in tables.items()
        for field in dataclasses.fields(config)
    ]


def load_recipe(name_or_path: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a shipped recipe by its name, or any TOML file by its path.

    Args:
        name_or_path: "vitb16", or "my/recipe.toml".
        overrides: values by dotted name, {"train.batch_size": 64}; they win over the file.

    Raises:
        ValueError: an unknown recipe, table, key or a bad value; lists what is valid.
        FileNotFoundError: no such file.
    """
    values, origin = _read(name_or_path, seen=())
    values.setdefault("name", Path(name_or_path).stem)
    overrides = overrides or {}
    for key in overrides:
        check_setting(key)
    set_now = [key for key, value in overrides.items() if value is not None]
    for key, value in {**overrides, **implied_settings(set_now)}.items():
        _put(values, key, value)
    return recipe_from_dict(values, origin)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """All settings as nested plain values, for JSON."""
    return dataclasses.asdict(recipe)


def recipe_from_dict(values: Mapping[str, Any], origin: str = "recipe") -> Recipe:
    """The inverse of `recipe_to_dict`; lists become tuples, missing keys take their defaults.

    Raises:
        ValueError: naming `origin`, the key, and what is valid.
    """
    tables = _tables()
    if not isinstance(values, Mapping):
        raise ValueError(f"{origin} must be a table, got {values!r}")
    check_known(values, ["name", "base", *tables], f"{origin}: unknown table")
    arguments: dict[str, Any] = {"name": str(values.get("name", Recipe.name))}
    for table, config in tables.items():
        entries = values.get(table, {})
        if not isinstance(entries, Mapping):
            raise ValueError(f"{origin}: {table} must be a table, got {entries!r}")
        hints = typing.get_type_hints(config)
        check_known(entries, list(hints), f"{origin}: unknown key in [{table}]")
        typed = {
            key: _convert(value, hints[key], f"{origin}: {table}.{key}")
            for key, value in entries.items()
        }
        try:
            arguments[table] = config(**typed)
        except ValueError as error:
            raise ValueError(f"{origin}: [{table}] {error}") from None
    try:
        return Recipe(**arguments)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None


def with_settings(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with values by dotted name in place of its own."""
    values = recipe_to_dict(recipe)
    for key, value in settings.items():
        _put(values, key, value)
    return recipe_from_dict(values)


def check_setting(key: str) -> None:
    """Raise ValueError with the valid settings unless `key` ("train.batch_size") is one."""
    table = key.partition(".")[0]
    in_table = [name for name in setting_names() if name.partition(".")[0] == table]
    check_known([key], in_table or setting_names(), "unknown setting")


def implied_settings(given: Iterable[str]) -> dict[str, Any]:
    """What else changes in a recipe when `given` settings are about to be set: {"train.epochs":
    None} for "train.steps", {"data.source": "folder"} for "data.path". Nothing that is given."""
    given = list(given)
    pairs = (_IMPLIED[key] for key in given if key in _IMPLIED)
    return {other: value for other, value in pairs if other not in given}


def check_known(given: Iterable[str], valid: list[str], what: str) -> None:
    """Raise ValueError naming the first unknown entry, the nearest valid one and all of them."""
    for name in given:
        if name not in valid:
            near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"{what} {name!r}{hint} Valid: {', '.join(valid)}")


def _tables() -> dict[str, type]:
    """Table name to its dataclass."""
    hints = typing.get_type_hints(Recipe)
    return {
        name: hint
        for name, hint in hints.items()
        if isinstance(hint, type) and dataclasses.is_dataclass(hint)
    }


def _read(name_or_path: str, seen: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    """Values of a recipe file laid over those of its base, and the file's name for messages."""
    if Path(name_or_path).is_dir() and name_or_path not in recipe_names():
        raise ValueError(
            f"{name_or_path} is a folder, not a recipe: images are given by "
            f"--data.path {name_or_path}, runs by --resume {name_or_path}"
        )
    source: Traversable = Path(name_or_path)
    if _is_path(name_or_path):
        if not source.is_file():
            raise FileNotFoundError(
                f"no recipe file {name_or_path}; recipes by name: {', '.join(recipe_names())}"
            )
    else:
        check_known([name_or_path], recipe_names(), "unknown recipe")
        source = resources.files("ijepa.configs") / f"{name_or_path}.toml"
    if name_or_path in seen:
        raise ValueError(f"recipe {name_or_path} is its own base: {' -> '.join(seen)}")
    try:
        # Editors on Windows put a byte order mark first, which TOML itself does not know.
        values = tomllib.loads(source.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name_or_path} is not UTF-8 (byte {error.object[error.start]:#04x} at position "
            f"{error.start}): save it in that encoding"
        ) from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{name_or_path} is not valid TOML: {error}") from None
    for table in _tables():
        if not isinstance(values.get(table, {}), dict):
            raise ValueError(f"{name_or_path}: {table} must be a table, got {values[table]!r}")
    base = values.pop("base", None)
    inherited: dict[str, Any] = {}
    if base is not None:
        base = str(base)
        if _is_path(base):
            base = os.path.normpath(Path(name_or_path).parent / base)
        inherited, _ = _read(base, (*seen, name_or_path))
        inherited.pop("name", None)
    for table, entries in values.items():
        if isinstance(entries, dict):
            for key, value in entries.items():
                _put(inherited, f"{table}.{key}", value)
            names = [f"{table}.{key}" for key in entries]
            for key, value in implied_settings(names).items():
                _put(inherited, key, value)
        else:
            inherited[table] = entries
    return inherited, name_or_path


def _is_path(name_or_path: str) -> bool:
    return name_or_path.endswith(".toml") or "/" in name_or_path


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """values["train"]["steps"] = value for the key "train.steps"."""
    table, _, name = key.rpartition(".")
    target = values.setdefault(table, {}) if table else values
    target[name] = value


def _convert(value: Any, hint: Any, where: str) -> Any:
    """A TOML or JSON value as the type a field declares; ValueError names what was expected."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments:
            check_known([str(value)], [str(a) for a in arguments], f"{where}: bad value")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        inner = next(a for a in arguments if a is not type(None))
        return _convert(value, inner, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a list, got {value!r}")
        open_ended = arguments[-1] is Ellipsis
        if not open_ended and len(value) != len(arguments):
            raise ValueError(f"{where} must have {len(arguments)} entries, got {value!r}")
        return tuple(_convert(entry, arguments[0], where) for entry in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{where} is beyond any float, got {value}") from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be of type {hint.__name__}, got {value!r}")
    return value
