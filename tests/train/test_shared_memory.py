"""Data workers hand over their batches in /dev/shm, which containers keep small."""

import os
import subprocess
import sys

import pytest
from small_runs import photographs, small_arguments

from ijepa import cli
from ijepa.train.checkpoint import load_checkpoint


@pytest.fixture
def little_shared_memory():
    """A prefix of commands that find 256 kB in /dev/shm."""
    inside = 'mount -t tmpfs -o size=256k tmpfs /dev/shm && exec "$@"'
    prefix = ["unshare", "--map-root-user", "--mount", "sh", "-c", inside, "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    return prefix


@pytest.mark.parametrize("workers", [0, 1])
def test_no_room_for_a_batch_ends_the_run_in_words(little_shared_memory, tmp_path, workers):
    """The run once waited for ever for a batch that its worker had dropped."""
    settings = photographs(tmp_path / "photos", 40, classes=1) | {"data__workers": workers}
    settings |= {"model__image_size": [64, 64], "train__batch_size": 40, "train__steps": 2}
    done = subprocess.run(
        [*little_shared_memory, sys.executable, "-m", "ijepa.cli", "pretrain",
         *small_arguments(tmp_path / "run", **settings)],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1",
                          "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
    )  # fmt: skip
    if workers == 0:
        assert done.returncode == 0, done.stderr
        assert load_checkpoint(tmp_path / "run").step == 2
        return
    assert done.returncode == 1, done.stdout
    assert "ijepa: error: no room in shared memory for a batch" in done.stderr
    assert "docker run --shm-size=8g" in done.stderr and "Traceback" not in done.stderr


def test_what_a_worker_refuses_comes_without_its_traceback(tmp_path, capsys):

    settings = photographs(tmp_path / "photos", 8, classes=1) | {"data__workers": 1}
    for path in (tmp_path / "photos").iterdir():
        path.write_bytes(b"not an image")
    assert cli.main(["pretrain", *small_arguments(tmp_path / "run", **settings)]) == 1
    error = capsys.readouterr().err
    assert "most of this data set is damaged" in error and "Traceback" not in error
