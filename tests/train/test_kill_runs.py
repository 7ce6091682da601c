"""SIGKILL at random moments of a run: the short form of `kill_runs.py`."""

import random

import pytest
from kill_runs import kill_runs


@pytest.mark.parametrize(("ranks", "kills"), [(1, 3), (2, 1)])
def test_kills_at_random_moments_change_nothing(tmp_path, monkeypatch, ranks, kills):
    monkeypatch.setenv("IJEPA_CACHE", str(tmp_path / "cache"))
    seed = random.randrange(1 << 32)  # shown where it fails: `kill_runs.py --seed` repeats it
    counts = kill_runs(kills, ranks, seed, 20, tmp_path)
    assert counts["killed"] == kills and counts["runs"] >= 1, f"seed {seed}: {counts}"
