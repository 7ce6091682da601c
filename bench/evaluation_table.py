"""The table of docs/evaluation.md: every protocol on one task, the random network beside.

    python -m bench.evaluation_table SOURCE TASK OUT [--seeds 3] [--epochs 3] [--only knn ...]

Runs `ijepa eval` with the settings that the page names, each of them once: results that lie in OUT
already are not computed again, so that it can be stopped. Prints the commands and the table.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
from pathlib import Path

from ijepa import cli
from ijepa.train.checkpoint import LATEST

ROWS = ("knn", "linear", "lowshot", "few", "all")
NAMES = {
    "knn": "kNN, best k",
    "linear": "linear probe, best head",
    "lowshot": "low-shot probe, 10 labels a class",
    "few": "fine-tuned, 10 labels a class",
    "all": "fine-tuned, all labels",
}


def commands(row: str, seeds: int, epochs: int) -> list[list[str]]:
    """Protocol and options of a row, one list for each seed."""
    if row in ("knn", "linear"):
        return [[row]]
    if row == "lowshot":
        return [["lowshot", "--per-class", "10", "--draws", str(seeds)]]
    small = ["finetune", "--preset", "small"]
    if row == "few":
        few = [*small, "--per-class", "10", "--epochs", "100", "--step-images", "50"]
        return [[*few, "--seed", str(seed)] for seed in range(seeds)]
    return [[*small, "--epochs", str(epochs), "--warmup-epochs", "1"]]


def run(source: str, task: str, out: Path, row: str, random: bool, seeds: int, epochs: int) -> str:
    """A row's cell for one network, after whatever of it is missing was run."""
    who = "random" if random else "trained"
    accuracies: list[float] = []
    interval = (0.0, 0.0)
    for number, (protocol, *options) in enumerate(commands(row, seeds, epochs)):
        result = out / f"{task}-{row}-{who}-{number}.json"
        command = ["eval", protocol, source, "--data", task, *options]
        command += ["--random-network"] if random else []
        print("ijepa", shlex.join(command), flush=True)
        if not result.exists():
            folder = out / "runs" / result.stem
            if (folder / "checkpoints" / LATEST).exists():  # stopped on its way
                command = ["eval", "finetune", "--resume", str(folder)]
            else:
                command += ["--output", str(folder)] if protocol == "finetune" else []
                command += ["--out", str(result)]
            if cli.main(command) or not result.exists():
                raise SystemExit(f"{result.stem} is not finished")
        found = json.loads(result.read_text())
        accuracies += found["best"]["draws"] or [found["best"]["accuracy"]]
        interval = tuple(found["interval_95"])
    if len(accuracies) > 1:
        spread = 100 * statistics.stdev(accuracies)
        return f"{100 * statistics.mean(accuracies):.1f} ± {spread:.1f} ({len(accuracies)})"
    return f"{100 * accuracies[0]:.1f} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("task")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3, help="on all labels")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS)
    given = parser.parse_args()
    lines = [f"| {given.task}, % | pretrained | random network |", "|---|---|---|"]
    for row in given.only:
        cells = [
            run(given.source, given.task, given.out, row, random, given.seeds, given.epochs)
            for random in (False, True)
        ]
        lines.append(f"| {NAMES[row]} | {cells[0]} | {cells[1]} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
