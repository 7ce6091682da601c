"""`ijepa ablate` and `ijepa sweep` on the command line."""

from __future__ import annotations

from typing import Any

import tyro

from ijepa.ablate.grid import grid_comparison, setting_and_value
from ijepa.ablate.options import AblateOptions, ManyRuns, SweepOptions
from ijepa.ablate.tables import TABLES, Comparison
from ijepa.recipes import load_recipe


def ablate_command(arguments: list[str]) -> int:
    """`ijepa ablate TABLE`."""
    options = tyro.cli(AblateOptions, args=arguments, prog="ijepa ablate")
    if options.table not in TABLES:
        known = ", ".join(f"{number} ({table.title})" for number, table in TABLES.items())
        raise ValueError(f"table {options.table} is none of the paper's ablations: {known}")
    return _compare(TABLES[options.table], options.base, options)


def sweep_command(arguments: list[str]) -> int:
    """`ijepa sweep RECIPE --vary table.key=value,value ...`."""
    options = tyro.cli(SweepOptions, args=arguments, prog="ijepa sweep")
    return _compare(grid_comparison(list(options.vary)), options.recipe, options)


def _compare(comparison: Comparison, base: str, options: ManyRuns) -> int:
    for name in ("seeds", "processes", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    changes: dict[str, Any] = dict(setting_and_value(text) for text in options.set)
    recipe = load_recipe(base)

    from ijepa.ablate.compare import compare

    return compare(comparison, recipe, changes, options)
