"""SIGKILL at random moments of a run, from the start of its process to its closing table.

    python tests/kill_runs.py --kills 200 --ranks 2 --seed 0

A run is killed and started again until one of its processes lives to the end. Then weights and
optimiser must be those of a run that nobody killed, bit for bit, and the log must have every step
once. It checkpoints every step and takes anew, at each start, none, one or two data workers. Killed
is the main process alone, one rank alone, or all of the run's processes together.

`train/test_kill_runs.py` is a short form of it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from small_runs import small_arguments

from ijepa.report.metrics import read_metrics
from ijepa.train.checkpoint import Checkpoint, holds_checkpoint, load_checkpoint

SETTINGS = {"train__checkpoint_every": 1, "monitor__every": 5, "monitor__evaluate": True}
SECONDS = 300  # after which a process that should have ended hangs


def kill_runs(kills: int, ranks: int, seed: int, steps: int, folder: Path) -> Counter:
    """Kill runs of so many steps until that many kills are done and the last run has ended.

    Args:
        folder: where they lie, and one that nobody killed.

    Returns:
        How many processes were killed before their first step, between steps and after the last
        one, and how many runs came to their end.

    Raises:
        AssertionError: a run could not go on, or ended otherwise than an undisturbed one; its
            folder is left.
    """
    moments = random.Random(seed)
    started = time.monotonic()
    end(start(folder / "undisturbed", ranks, steps, workers=1))
    seconds = time.monotonic() - started
    expected = load_checkpoint(folder / "undisturbed")
    counts: Counter = Counter()
    while counts["killed"] < kills:
        run = folder / f"run-{counts['runs']}"
        while True:
            process = start(run, ranks, steps, workers=moments.randint(0, 2))
            try:
                process.wait(moments.uniform(0, seconds) if counts["killed"] < kills else SECONDS)
            except subprocess.TimeoutExpired:
                moment = kill(process, run, ranks, steps, moments)
                if process.returncode != 0:
                    counts["killed"] += 1
                    counts[moment] += 1
                    continue  # else it had come to its end first
            end(process)
            break
        check(run, expected, steps)
        shutil.rmtree(run)
        counts["runs"] += 1
        print(f"{dict(counts)}: the last run ended as an undisturbed one", flush=True)
    return counts


def start(run: Path, ranks: int, steps: int, workers: int) -> subprocess.Popen:
    """A process that goes on with the run, or begins it where it has no checkpoint yet."""
    if holds_checkpoint(run):
        arguments = ["--resume", str(run), "--data.workers", str(workers)]
    else:
        arguments = small_arguments(
            run, train__steps=steps, data__workers=workers, **SETTINGS
        )
    command = [sys.executable, "-m"]
    if ranks > 1:
        command += ["torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend",
                    "c10d", "--rdzv-endpoint", "localhost:0", "-m"]  # fmt: skip
    return subprocess.Popen(
        [*command, "ijepa.cli", "pretrain", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def end(process: subprocess.Popen) -> None:
    """Wait for a process that nobody kills."""
    output = process.communicate(timeout=SECONDS)[0]
    assert process.returncode == 0, output


def kill(
    process: subprocess.Popen, run: Path, ranks: int, steps: int, moments: random.Random
) -> str:
    """Kill something of a run; says in which part of it that was."""
    logged = [line["step"] for line in read_metrics(run) if "loss" in line]
    members = children(process.pid) if ranks > 1 else [process.pid]
    victim = moments.choice([*members[:ranks], None])
    for pid in [victim] if victim else [process.pid, *descendants(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(SECONDS)
    if not logged:
        return "before the first step"
    return "after the last step" if logged[-1] == steps else "between steps"


def children(pid: int) -> list[int]:
    """Processes started by a process, in the order of their numbers."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                if int(parent) == pid:
                    found.append(int(entry.name))
    return sorted(found)


def descendants(pid: int) -> list[int]:
    """Children and theirs; torchrun gives each rank a session of its own."""
    return [found for child in children(pid) for found in (child, *descendants(child))]


def check(run: Path, expected: Checkpoint, steps: int) -> None:
    """Weights, optimiser, log, panel and report are those of an undisturbed run."""
    found = load_checkpoint(run)
    assert found.step == expected.step == steps, found.step
    for name, tensor in expected.weights.items():
        assert torch.equal(found.weights[name], tensor), f"{run}: {name} differs"
    ours, theirs = (c.state["trainer"]["optimizer"]["state"] for c in (found, expected))
    assert ours.keys() == theirs.keys()
    for key in theirs:
        for name, tensor in theirs[key].items():
            assert torch.equal(ours[key][name], tensor), f"{run}: {name} of {key} differs"
    lines = read_metrics(run)
    logged = [line["step"] for line in lines if "loss" in line]
    assert logged == list(range(1, steps + 1)), f"{run}: the log has steps {logged}"
    panels = [line["step"] for line in lines if "cosine" in line]
    assert panels == list(range(0, steps + 1, 5)), f"{run}: the log has panels {panels}"
    assert (run / "summary.md").exists() and (run / "curves.png").exists()
    assert not list(run.rglob("*partial*")), f"{run}: something half-written is left"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=250, help="of a run, a multiple of 5")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill_runs_"))
    print(f"runs are in {folder}", flush=True)
    os.environ.setdefault("IJEPA_CACHE", str(folder / "cache"))
    started = time.monotonic()
    counts = kill_runs(options.kills, options.ranks, options.seed, options.steps, folder)
    print(f"{dict(counts)}, {options.ranks} ranks, seed {options.seed}, "
          f"{time.monotonic() - started:.0f} s: every run ended as an undisturbed one")  # fmt: skip
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
