"""`bench/on_gpu.sh` with a stand-in for Python: what one part does must not touch the others."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from bench.never_ran import outcomes

ROOT = Path(__file__).parents[2]
PARTS = ("ceilings", "step", "attention", "optimizer", "tokens", "packed", "profile", "report")
FILES = {
    "attention": "bench_attention", "optimizer": "bench_adamw_ema", "step": "-k truncate",
    "tokens": "bench_gather",
}  # fmt: skip

# Files a line for every call, then does what the test has planted for one part.
STAND_IN = """#!/usr/bin/env bash
case "$*" in *"import xdist"*|*bench.goals*|*bench.never_ran*) exit 0;; esac
if [ "${BENCH_ROUNDS:-}" = 1 ]; then exit 0; fi  # compiles beside the tests, measures nothing
echo "$*" >>"$BENCH_RESULTS/measured.txt"
case "$*" in *"$PLANTED_IN"*) eval "$PLANTED";; esac
exit 0
"""


def start(folder: Path, part: str, planted: str, **environment: str) -> subprocess.Popen:
    stand_in = folder / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    environment = os.environ | {
        "PYTHON": str(stand_in), "PLANTED_IN": FILES[part], "PLANTED": planted,
        "ONLY": " ".join(PARTS), "PART_SECONDS": "2",
    } | environment  # fmt: skip
    return subprocess.Popen(
        ["bash", "bench/on_gpu.sh", str(folder / "out")], cwd=ROOT, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def summary(folder: Path) -> dict[str, str]:
    """Part to what the summary says of it."""
    lines = (folder / "out" / "summary.txt").read_text().splitlines()
    return dict(line.split(": ", 1) for line in lines if ": " in line)


def measured(folder: Path) -> str:
    return (folder / "out" / "results" / "measured.txt").read_text()


@pytest.mark.parametrize("part", ["step", "attention", "optimizer"])
@pytest.mark.parametrize(
    ("planted", "outcome"),
    [("exit 1", "exit 1"), ("sleep 100", "exit 124")],
    ids=["fails", "hangs"],
)
def test_a_part_that_fails_or_hangs_costs_no_other(tmp_path, part, planted, outcome):
    run = start(tmp_path, part, planted)
    run.communicate(timeout=100)
    assert run.returncode == 1
    found = summary(tmp_path)
    assert found.pop(part).startswith(outcome)
    assert set(found) == set(PARTS) - {part}
    assert all(line.startswith("exit 0 ") for line in found.values()), found
    for name, file in FILES.items():
        assert file in measured(tmp_path), name


def test_a_call_that_is_killed_keeps_what_it_had(tmp_path):
    run = start(tmp_path, "attention", "sleep 100", PART_SECONDS="60")
    deadline = time.monotonic() + 60
    while not (
        (tmp_path / "out" / "results" / "measured.txt").exists()
        and FILES["attention"] in measured(tmp_path)
    ):
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    subprocess.run(["pkill", "-9", "-f", str(tmp_path)], check=False)
    assert list(summary(tmp_path)) == ["ceilings", "step"]
    assert FILES["step"] in measured(tmp_path)


def test_a_call_out_of_time_says_what_it_never_started(tmp_path):
    run = start(tmp_path, "step", "sleep 100", PART_SECONDS="60", BENCH_SECONDS="22")
    run.communicate(timeout=100)
    found = summary(tmp_path)
    assert found["step"].startswith("exit 124")
    assert found["tokens"].startswith("not started")
    assert found["report"].startswith("exit 0")


def test_what_never_ran_is_counted(tmp_path):
    report = tmp_path / "tests.txt"
    report.write_text("passed tests/test_ema.py::a\nfailed tests/test_ema.py::b\n"
                      "passed tests/test_ema.py::b\n")  # fmt: skip
    assert outcomes(report) == {"tests/test_ema.py::a": "passed", "tests/test_ema.py::b": "failed"}
    assert outcomes(tmp_path / "none.txt") == {}
