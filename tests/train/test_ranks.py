"""Ranks that were not started alike, as machines with copies of data or recipes are: each once
trained a run of its own, and what the first one had was saved."""

import os
import random
import subprocess
import sys

import pytest
from small_runs import photographs, small_arguments

from ijepa.train.checkpoint import holds_checkpoint


@pytest.mark.parametrize(
    ("of_second_rank", "expected"),
    [
        (["--train.seed", "1"], "train.seed is 0 on rank 0 and 1 on rank 1"),
        (["--data.path", "fewer"], "the data's images is 13 on rank 0 and 12 on rank 1"),
        (["--data.path", "others"], "the data's names is "),
    ],
)
def test_ranks_that_would_train_different_runs_are_refused(tmp_path, of_second_rank, expected):
    settings = photographs(tmp_path / "photos", 13, classes=1)
    photographs(tmp_path / "fewer", 12, classes=1)
    photographs(tmp_path / "others", 13, classes=1)
    (tmp_path / "others" / "7.png").rename(tmp_path / "others" / "seven.png")
    script = tmp_path / "start.py"
    script.write_text(
        "import os, sys\n"
        "from ijepa import cli\n"
        f"own = {of_second_rank!r} if os.environ['RANK'] == '1' else []\n"
        "sys.exit(cli.main(sys.argv[1:] + own))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "--master-port", str(random.randint(20_000, 60_000)), str(script),
         "pretrain", *small_arguments("run", **settings)],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1",
                          "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert f"the ranks would train different runs: {expected}" in done.stderr, done.stderr
    assert not holds_checkpoint(tmp_path / "run")
    assert not (tmp_path / "run").exists()
