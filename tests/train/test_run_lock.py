"""One process a run; `test_faults.py` does it with runs."""

import errno
import os
import subprocess
import sys

import pytest

from ijepa.train.run_lock import RunLock

HOLD = (
    "import sys; from pathlib import Path; from ijepa.train.run_lock import RunLock; "
    "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
)


def lock_elsewhere(folder) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", HOLD, str(folder)], input="", capture_output=True, text=True
    )


def test_a_second_process_is_refused_by_name_until_release(tmp_path):
    lock = RunLock(tmp_path)
    refused = lock_elsewhere(tmp_path)
    assert f"{tmp_path} is being trained by process {os.getpid()} on " in refused.stderr
    assert lock_elsewhere(tmp_path).stdout == ""  # that it was refused took nothing away
    lock.release()
    lock.release()  # twice is once
    assert lock_elsewhere(tmp_path).stdout == "held\n"


def test_a_process_that_is_killed_frees_the_run(tmp_path):
    held = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert held.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match=f"by process {held.pid} on .*: wait until it ends"):
        RunLock(tmp_path)
    held.kill()
    held.wait()
    RunLock(tmp_path).release()


def test_a_file_system_without_locks_is_trained_on(tmp_path, monkeypatch):
    def fail(*_arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", fail)
    RunLock(tmp_path).release()


def test_a_link_is_no_lock(tmp_path):
    """In a folder from somebody else: what it led to was emptied."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"):
        RunLock(tmp_path / "run")
    assert victim.read_text() == "precious"
