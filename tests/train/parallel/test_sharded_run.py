"""A whole run in shards, one of whose ranks is killed: torchrun starts both again, and what comes
out is what one process makes of the same recipe."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import torch
from small_runs import small_arguments, small_recipe

from ijepa.interop import load_run
from ijepa.train.checkpoint import load_checkpoint
from ijepa.train.pretrain import pretrain

SCRIPT = """\
import os, sys
from pathlib import Path
from faulty_run import kill_rank
from ijepa import cli
from ijepa.train.checkpoint import holds_checkpoint

if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    kill_rank(1, 7)
elif os.environ["RANK"] == "0":
    print("started again beside a checkpoint:", holds_checkpoint(Path("run")), flush=True)
sys.exit(cli.main(["pretrain", *sys.argv[1:]]))
"""


def test_a_killed_rank_of_a_sharded_run_is_started_again(tmp_path):
    (tmp_path / "start.py").write_text(SCRIPT)
    settings = {"train__checkpoint_every": 2, "monitor__every": 6}
    here = os.path.dirname(__file__)
    paths = [*map(os.path.abspath, sys.path), os.path.dirname(here)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "--max-restarts", "1", "--master-port", str(random.randint(20_000, 60_000)), "start.py",
         *small_arguments("run", train__parallel="fsdp", **settings)],
        capture_output=True, text=True, timeout=600, cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "started again beside a checkpoint: True" in done.stdout
    pretrain(small_recipe(tmp_path / "alone", **settings))
    mine, alone = (load_checkpoint(tmp_path / name) for name in ("run", "alone"))
    assert mine.step == alone.step == 12
    for name, tensor in alone.weights.items():
        torch.testing.assert_close(mine.weights[name], tensor, atol=1e-4, rtol=1e-3, msg=name)
    assert load_run(tmp_path / "run").config == load_run(tmp_path / "alone").config
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))  # nothing half-written is left
