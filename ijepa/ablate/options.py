"""The options of `ijepa ablate` and `ijepa sweep`; nothing of torch is imported to parse them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

Table = Annotated[Positional[int], arg(metavar="TABLE")]
Recipe = Annotated[Positional[str], arg(metavar="RECIPE")]


@dataclass(frozen=True, kw_only=True)
class ManyRuns:
    """How many runs, and where."""

    seeds: int = 3
    """runs of every row, with seeds 0, 1, ..."""
    processes: int = 2
    """runs at once, each with its share of the cores; with a GPU: 1"""
    out: Path = Path("ablations")
    """folder of all runs; started again it goes on there"""
    set: tuple[str, ...] = ()
    """further settings of all runs, as train.steps=500 data.num_images=4000"""
    limit: int | None = None
    """do at most so many runs now; the same command later does the others"""
    task: str | None = None
    """of the closing probes; default: the first"""
    dry_run: bool = False
    """say what would be run, and what is over"""


@dataclass(frozen=True, kw_only=True)
class AblateOptions(ManyRuns):
    """One of the paper's ablations, Tables 6 to 14, on small runs.

    6 mask strategies, 7 targets, 8 scale of targets, 9 scale of the context, 10 number of targets,
    11 where targets are masked, 12 depth of the predictor, 13 weight decay, 14 width of the
    predictor. A table with mean and spread, a plot, the paper's figures beside.
    """

    table: Table
    """number in the paper"""
    base: str = "ablation-small"
    """recipe that all rows start from, a name or a TOML file"""


@dataclass(frozen=True, kw_only=True)
class SweepOptions(ManyRuns):
    """Every combination of some settings' values, under several seeds.

    ijepa sweep shapes-tiny --vary schedule.peak_lr=5e-4,1e-3 masks.num_targets=2,4
    """

    recipe: Recipe
    """that all runs start from, a name or a TOML file"""
    vary: tuple[str, ...]
    """table.key=value,value for each setting; values as in TOML, lists in brackets"""
