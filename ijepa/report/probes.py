"""probes.json: the closing table of a run for programs, beside summary.md for people."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ijepa.disk import write_whole
from ijepa.evaluate.closing import ProbeRow, ProbeScores

FILE_NAME = "probes.json"


@dataclasses.dataclass(frozen=True)
class Probes:
    """Rows of the closing table and, task by task, the accuracy of guessing."""

    chance: Mapping[str, float]
    rows: Sequence[ProbeRow]


def write_probes(folder: Path, probes: Probes) -> None:
    """Write `folder`/probes.json.

    Raises:
        NotWritten: there is no room.
    """
    described = {
        "chance": dict(probes.chance),
        "rows": [dataclasses.asdict(row) for row in probes.rows],
    }
    write_whole(folder / FILE_NAME, json.dumps(described, indent=1) + "\n")


def read_probes(folder: Path) -> Probes | None:
    """What `write_probes` wrote; None where nothing is there.

    Raises:
        ValueError: the file holds something else.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        chance = {str(task): _share(value) for task, value in found["chance"].items()}
        rows = [_row(row) for row in found["rows"]]
        for row in rows:
            if row.scores and set(row.scores) != set(chance):
                raise ValueError(f"{row.features!r} has other tasks than {', '.join(chance)}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no table of probes: {error}") from None
    return Probes(chance, rows)


def _row(row: Any) -> ProbeRow:
    fields = [field.name for field in dataclasses.fields(ProbeScores)]
    scores = {
        str(task): ProbeScores(**{name: _share(score[name]) for name in fields})
        for task, score in row["scores"].items()
    }
    return ProbeRow(str(row["features"]), scores)


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"an accuracy must lie in [0, 1], got {value!r}")
    return float(value)
