"""Counts the GPU tests that passed, failed and never ran.

python -m bench.never_ran OUT/tests.txt

tests.txt holds a line a test that ended, "outcome node-id", as `tests/conftest.py` writes it where
TEST_REPORT names a file. A machine whose time was over leaves the rest of the list unwritten.
"""

import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent


def outcomes(report: Path) -> dict[str, str]:
    """Node id to outcome; a failure outweighs what else is written of a test."""
    found: dict[str, str] = {}
    if not report.exists():
        return found
    for line in report.read_text().splitlines():
        outcome, _, node = line.partition(" ")
        if found.get(node) != "failed":
            found[node] = outcome
    return found


def collected() -> set[str]:
    """Node ids of every GPU test there is."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu"]
    command += ["--continue-on-collection-errors", "tests"]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout
    return {line for line in listed.splitlines() if "::" in line and " " not in line.split("[")[0]}


def main() -> None:
    """Print one line, and the failures by name."""
    found = outcomes(Path(sys.argv[1]))
    waiting = collected() - found.keys()
    counts = Counter(found.values())
    listed = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()))
    print(f"GPU tests: {listed or 'none ran'}, {len(waiting)} never ran")
    for node, outcome in sorted(found.items()):
        if outcome == "failed":
            print(f"failed: {node}")


if __name__ == "__main__":
    main()
