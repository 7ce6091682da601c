"""How runs end: with their report, with the last good checkpoint named, and never in silence."""

import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import masked_vit_kernels
import pytest
import torch
from small_runs import photographs, small_arguments, small_recipe

import ijepa
from ijepa import cli
from ijepa.model import IJEPA
from ijepa.report.metrics import read_metrics
from ijepa.train import checkpoint, schedules
from ijepa.train.checkpoint import load_checkpoint
from ijepa.train.pretrain import pretrain
from ijepa.train.resume import resume_command
from ijepa.train.saving import Saving
from ijepa.train.stop_signals import StopSignals
from ijepa.train.trainer import Trainer

# Absolute, for processes in other folders.
IMPORTS = os.pathsep.join(str(Path(m.__path__[0]).parent) for m in (ijepa, masked_vit_kernels))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path_factory, tmp_path, monkeypatch):
    """A cache of rendered images that all of these runs share, and a working folder of its own."""
    monkeypatch.setenv("IJEPA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order
    yield
    torch.set_num_threads(threads)


# The closing.


@pytest.mark.parametrize("count", [2, 4, 5])
def test_few_labelled_images_cost_the_probes_and_nothing_else(tmp_path, capsys, count):
    settings = photographs(tmp_path / "photos", count)
    settings |= {"train__batch_size": 2, "train__steps": 3, "monitor__every": 3}
    assert cli.main(["pretrain", *small_arguments("run", **settings, monitor__evaluate=True)]) == 0
    shown, summary = capsys.readouterr().out, (tmp_path / "run" / "summary.md").read_text()
    for name in ("curves.png", "masks.png"):
        assert (tmp_path / "run" / name).exists()
    if count < 5:
        for text in (" ".join(shown.split()), summary):
            assert f"takes at least 5, and there are {count}" in text
    else:
        assert "| raw pixels |" in summary


def test_a_folder_of_one_image_is_trained_on(tmp_path, capsys):
    settings = photographs(tmp_path / "photos", 1, classes=1)
    settings |= {"train__batch_size": 1, "train__steps": 2, "monitor__every": 1}
    assert cli.main(["pretrain", *small_arguments("run", **settings, monitor__evaluate=True)]) == 0
    assert "No collapse panel: it compares images" in " ".join(capsys.readouterr().out.split())
    assert load_checkpoint(tmp_path / "run").step == 2
    assert (tmp_path / "run" / "summary.md").exists()
    assert not any("cosine" in line for line in read_metrics(tmp_path / "run"))


def test_probes_that_break_leave_the_report(tmp_path, capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("ijepa.train.conclusion.closing_table", broken)
    arguments = small_arguments("run", train__steps=2, monitor__evaluate=True)
    assert cli.main(["pretrain", *arguments]) == 1
    assert "out of memory" in capsys.readouterr().err
    assert "| learning rate |" in (tmp_path / "run" / "summary.md").read_text()
    assert (tmp_path / "run" / "curves.png").exists()


# A checkpoint that is damaged, or leads elsewhere.


def damage(run, step):
    file = run / "checkpoints" / f"step-{step:08d}" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


@pytest.fixture
def run(tmp_path):
    """A finished run of 12 steps with checkpoints of steps 8 and 12."""
    pretrain(small_recipe("run"))
    return tmp_path / "run"


def test_beside_a_damaged_checkpoint_the_intact_one_is_named(run, capsys):
    # copies: what is loaded is mapped from the file that is about to be damaged
    whole = {name: tensor.clone() for name, tensor in load_checkpoint(run).weights.items()}
    damage(run, 12)
    for path in ("run", "run/checkpoints", "run/checkpoints/step-00000012"):
        assert cli.main(["pretrain", "--resume", path]) == 1
        message = capsys.readouterr().err
        assert "weights.safetensors is damaged" in message
        assert "The checkpoint of step 8 beside it is intact" in message
        command = message.splitlines()[-1].split()
        assert command == ["ijepa", "pretrain", "--resume", "run/checkpoints/step-00000008"]
    assert cli.main(command[1:]) == 0
    again = load_checkpoint(run)
    assert again.step == 12
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in whole.items())


def test_a_run_that_went_on_from_an_older_one_and_saved_nothing_goes_on_from_there(
    run, tmp_path, monkeypatch
):
    """Its log ends there too: going on from the newer one, it once had a gap."""
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cli.main(["pretrain", "--resume", "run/checkpoints/step-00000008"])
    assert cli.main(["pretrain", "--resume", "run", "--train.steps", "14"]) == 0
    steps = [line["step"] for line in read_metrics(run) if "loss" in line]
    assert steps == list(range(1, 15))


def test_beside_a_checkpoint_that_makes_no_sense_itself_is_not_named(run, capsys):
    """Its files are as they were written, and it was offered as the one to go on from."""
    file = run / "checkpoints" / "step-00000012" / "checkpoint.json"
    metadata = json.loads(file.read_text()) | {"state": {"dict": 5}}
    metadata["checksum"] = checkpoint._checksum(metadata)
    file.write_text(json.dumps(metadata))
    assert cli.main(["pretrain", "--resume", "run"]) == 1
    assert "checkpoint of step 8 beside it is intact" in capsys.readouterr().err


def test_a_log_that_a_disk_damaged_costs_its_damaged_lines(run):
    """A byte that is no UTF-8 once kept the run from going on, a foreign line from its report."""
    log = run / "metrics.jsonl"
    first, *others = log.read_bytes().splitlines(keepends=True)
    foreign = b'{}\n5\nnull\n"x"\n{"step": "a"}\n{"step": 3, "loss": "x"}\n' + bytes(range(256))
    log.write_bytes(first.replace(b"loss", b"l\xffss") + foreign + b"\n" + b"".join(others))
    assert cli.main(["pretrain", "--resume", "run", "--train.steps", "14"]) == 0
    steps = [line["step"] for line in read_metrics(run) if "loss" in line]
    assert steps == list(range(2, 15))
    assert (run / "curves.png").exists()


def test_where_no_checkpoint_is_intact_none_is_named(run, capsys):
    damage(run, 8)
    damage(run, 12)
    assert cli.main(["pretrain", "--resume", "run"]) == 1
    message = capsys.readouterr().err
    assert "is damaged" in message and "--resume" not in message


def test_a_resumed_run_writes_into_no_other_folder(run, tmp_path, capsys):
    shutil.copytree(run / "checkpoints" / "step-00000008", tmp_path / "best" / "copied")
    assert cli.main(["pretrain", "--resume", "best/copied"]) == 1
    assert "does not lie in a run's folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["copied"]
    os.chdir(run / "checkpoints")  # a name without folders stands for what it is
    assert cli.main(["pretrain", "--resume", "step-00000008"]) == 0
    assert load_checkpoint(run).step == 12


def test_names_and_outputs_stay_where_runs_are(tmp_path, capsys):
    (tmp_path / "evil.toml").write_text('base = "shapes-tiny"\nname = "../../evil"\n')
    assert cli.main(["pretrain", "evil.toml"]) == 1
    assert "evil.toml: name must be one that a folder can have" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "--train.output", ""])
    assert "output must name a folder" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["evil.toml"]


# Training that diverges.


def blow_up(monkeypatch, step, factor):
    """Multiply the learning rate of one step."""
    schedule = schedules.schedule_at

    def blown(config, index):
        values = schedule(config, index)
        return values._replace(lr=values.lr * factor) if index == step - 1 else values

    monkeypatch.setattr("ijepa.train.trainer.schedule_at", blown)


def test_weights_that_overflow_are_not_saved(tmp_path, monkeypatch, capsys):
    """Once, 52 tensors of the target encoder were infinite in the checkpoint that was kept."""
    blow_up(monkeypatch, step=6, factor=1e42)
    assert cli.main(["pretrain", *small_arguments("run", optim__max_skipped_steps=30)]) == 1
    message = capsys.readouterr().err
    assert re.search(r"after step \d+ \d+ of \d+ tensors are not finite, \w+_encoder\.", message)
    assert "Last good: step 4, continue with\n  ijepa pretrain --resume run" in message
    good = load_checkpoint("run")
    assert good.step == 4
    assert all(tensor.isfinite().all() for tensor in good.weights.values())
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1


def test_a_run_that_skips_keeps_the_checkpoints_of_before(tmp_path, monkeypatch, capsys):
    """Huge weights, but finite: every further loss is not, and each save was of those weights."""
    blow_up(monkeypatch, step=6, factor=1e38)
    arguments = small_arguments("run", train__checkpoint_every=1, optim__max_skipped_steps=4)
    assert cli.main(["pretrain", *arguments]) == 1
    captured = capsys.readouterr()
    assert "5 steps in a row, from step 7 on. Nothing was saved since" in captured.err
    # step 6 is whole and finite, and what the failure began with
    assert "Last good: step 5, continue with" in captured.err
    assert captured.err.endswith("ijepa pretrain --resume run/checkpoints/step-00000005\n")
    assert "step 7: not saved before there are updates again" in captured.out
    steps = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert steps == ["step-00000005", "step-00000006"]


def test_a_save_that_is_put_off_is_made_up_for(tmp_path, monkeypatch):
    """Step 4 and 5 are skipped; the checkpoint of step 4 comes after step 6."""
    accumulate, saved, save = Trainer._accumulate, [], Saving.save

    def skip(self, images, masks):
        loss = accumulate(self, images, masks)
        return loss * torch.nan if self.step_index in (3, 4) else loss

    monkeypatch.setattr(Trainer, "_accumulate", skip)
    monkeypatch.setattr(Saving, "save", lambda self, done: (saved.append(done), save(self, done)))
    pretrain(small_recipe("run"))
    assert saved == [6, 8, 12]


def test_a_run_that_diverges_at_once_has_nothing_to_go_on_from(monkeypatch, capsys):
    blow_up(monkeypatch, step=1, factor=1e42)
    assert cli.main(["pretrain", *small_arguments("run")]) == 1
    message = capsys.readouterr().err
    assert "No checkpoint was written: there is nothing to continue from." in message


# The command that goes on.


@pytest.mark.parametrize(
    ("environment", "command"),
    [
        ({}, "ijepa pretrain --resume 'my runs/a'"),
        (
            {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "8"},
            "torchrun --nproc-per-node 8 -m ijepa.cli pretrain --resume 'my runs/a'",
        ),
        (
            {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"},
            "torchrun --nnodes 2 --nproc-per-node 4 -m ijepa.cli pretrain --resume 'my runs/a'",
        ),
    ],
)
def test_the_command_that_goes_on_is_the_one_that_began(monkeypatch, environment, command):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert resume_command(Path("my runs/a")) == command


def test_two_ranks_say_once_how_to_go_on(tmp_path):
    """Stopped by a signal, and failing for want of finite numbers."""
    script = tmp_path / "fault.py"
    script.write_text(
        "import os, signal, sys\n"
        "import torch\n"
        "from ijepa import cli\n"
        "from ijepa.train.trainer import Trainer\n"
        "step = Trainer.step\n"
        "def stop(self, images, masks):\n"
        "    if self.step_index == 5:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return step(self, images, masks)\n"
        "accumulate = Trainer._accumulate\n"
        "def diverge(self, images, masks):\n"
        "    return accumulate(self, images, masks) * (torch.nan if self.step_index > 5 else 1)\n"
        "if sys.argv[1] == 'stop':\n"
        "    Trainer.step = stop\n"
        "else:\n"
        "    Trainer._accumulate = diverge\n"
        "sys.exit(cli.main(sys.argv[2:]))\n"
    )
    for fault, code, expected in (
        ("stop", 0, "Stopped and saved. Continue with:"),
        ("diverge", 1, "Last good: step 4, continue with"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
             "--master-port", str(random.randint(20_000, 60_000)),
             str(script), fault, "pretrain",
             *small_arguments(fault, optim__max_skipped_steps=2)],
            capture_output=True, text=True, timeout=300,
            env=os.environ | {"PYTHONPATH": IMPORTS},
        )  # fmt: skip
        shown = done.stdout + done.stderr
        assert done.returncode == code, shown
        command = f"torchrun --nproc-per-node 2 -m ijepa.cli pretrain --resume {fault}"
        assert shown.count(f"{expected}\n  {command}") == 1, shown
        assert shown.count("--resume") == 1, shown


# Signals.


def test_a_closed_terminal_saves(tmp_path):
    """The terminal is a real one: it hangs up, and whatever is written to it afterwards fails."""
    arguments = small_arguments("run", train__steps=100_000, train__checkpoint_every=100_000,
                                schedule__warmup_steps=0, data__workers=1)  # fmt: skip
    command = [sys.executable, "-m", "ijepa.cli", "pretrain", *arguments]
    process, terminal = pty.fork()
    if process == 0:
        os.execve(sys.executable, command, os.environ | {"PYTHONPATH": IMPORTS})
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(read_metrics(tmp_path / "run")) < 3:
        os.read(terminal, 10_000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    step = load_checkpoint(tmp_path / "run").step
    assert step >= 3
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, step + 1))


def test_a_run_under_nohup_stays_deaf_to_hangups(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals(lambda: None) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("at", "lost", "left"), [(3, "everything: nothing is saved yet", None),
                                                  (7, "all since step 4", 4)])  # fmt: skip
def test_a_second_ctrl_c_says_what_it_loses(tmp_path, monkeypatch, capfd, at, lost, left):
    step = Trainer.step

    def interrupted(self, images, masks):
        if self.step_index == at:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, images, masks)

    monkeypatch.setattr(Trainer, "step", interrupted)
    assert cli.main(["pretrain", *small_arguments("run")]) == 130
    shown = capfd.readouterr().err
    assert "Ctrl-C: stopping at the end of this step or micro-batch, then saving." in shown
    assert f"Ctrl-C again stops at once and loses {lost}.\ninterrupted\n" in shown
    if left is None:
        assert shown.endswith("No checkpoint was written: there is nothing to continue from.\n")
    else:
        assert f"Last good: step {left}, continue with\n  ijepa pretrain --resume run" in shown


def test_a_slow_step_is_given_up_between_its_micro_batches(tmp_path, monkeypatch, capfd):
    """SIGTERM in the second of three micro-batches of step 6; what is saved is step 5."""
    pretrain(small_recipe("whole", train__accumulate=3))
    forward, calls = IJEPA.forward, []

    def slow(self, *arguments):
        calls.append(1)
        if len(calls) == 5 * 3 + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(IJEPA, "forward", slow)
        patched.setattr("ijepa.train.pretrain.PATIENCE", 0.0)
        assert cli.main(["pretrain", *small_arguments("run", train__accumulate=3)]) == 0
    shown = capfd.readouterr()
    assert "SIGTERM: stopping at the end of this step or micro-batch, then saving.\n" in shown.err
    assert "Stopped and saved. Continue with:\n  ijepa pretrain --resume run" in shown.out
    assert len(calls) == 5 * 3 + 2 and load_checkpoint("run").step == 5
    assert cli.main(["pretrain", "--resume", "run"]) == 0
    whole = load_checkpoint("whole").weights
    for name, tensor in load_checkpoint("run").weights.items():
        assert torch.equal(tensor, whole[name]), name


def test_a_slow_panel_is_broken_off(tmp_path, monkeypatch):
    def slow(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    with monkeypatch.context() as patched:
        patched.setattr("ijepa.train.panel.encoder_features", slow)
        started = time.monotonic()
        assert not pretrain(small_recipe("run", monitor__every=5)).finished
    assert time.monotonic() - started < 30
    assert load_checkpoint("run").step == 0
    assert cli.main(["pretrain", "--resume", "run"]) == 0
    panels = [line["step"] for line in read_metrics(tmp_path / "run") if "cosine" in line]
    assert panels == [0, 5, 10, 12]


def test_a_reader_that_goes_away_ends_no_run(tmp_path):
    """`ijepa pretrain | head -1`: the run ended there, with nothing saved and nothing said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ijepa.cli", "pretrain", *small_arguments("run", monitor__every=2)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": IMPORTS},
    )  # fmt: skip
    assert process.stdout.readline().startswith("step 0: effective rank")
    process.stdout.close()
    told = process.stderr.read()
    assert process.wait() == 0, told
    assert "the run goes on without" in told and "Traceback" not in told
    assert load_checkpoint(tmp_path / "run").step == 12
    assert (tmp_path / "run" / "summary.md").exists()
