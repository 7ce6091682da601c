"""Faults that end runs: each is done for real, to a process of its own, and the run goes on.

Every run here is `small_runs`' of 12 steps with a line a step in its log; what is left of it after
the fault and a resume must be the bits of a run that nothing happened to.
"""

import contextlib
import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_runs import small_arguments, small_recipe

from ijepa import cli
from ijepa.report.metrics import read_metrics
from ijepa.train import panel
from ijepa.train.checkpoint import load_checkpoint
from ijepa.train.pretrain import Outcome, pretrain

FAULTY = str(Path(__file__).with_name("faulty_run.py"))
SECONDS = 120  # for a process that takes five


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    """One cache of rendered images for this file, and one thread: sums in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("IJEPA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patched.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, _cache):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert pretrain(small_recipe(folder)).finished
    return load_checkpoint(folder)


@pytest.fixture(scope="module")
def undisturbed_on_two_ranks(tmp_path_factory, _cache):
    folder = tmp_path_factory.mktemp("runs") / "ranks"
    done = finish(start(small_arguments(folder), ranks=2))
    assert done.returncode == 0, done.stdout
    return load_checkpoint(folder)


def start(arguments, fault=None, ranks=1, **options) -> subprocess.Popen:
    """`ijepa pretrain ARGUMENTS` in a session of its own, standard error among its output."""
    command = [sys.executable]
    if ranks > 1:
        port = str(random.randint(20_000, 60_000))
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        command += ["--master-port", port]
    command += [FAULTY, fault] if fault else ["-m", "ijepa.cli", "pretrain"]
    return subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Wait for its end; whatever it leaves running is killed."""
    try:
        output = process.communicate(timeout=SECONDS)[0]
    finally:
        kill_session(process)
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def kill_session(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run(arguments, fault=None, ranks=1, **options) -> subprocess.CompletedProcess:
    return finish(start(arguments, fault, ranks, **options))


def wait_until(condition, process) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def resume(folder) -> str:
    done = run(["--resume", str(folder)])
    assert done.returncode == 0, done.stdout
    return done.stdout


def assert_as_if_nothing_happened(folder, expected) -> None:
    """Weights and optimiser bit for bit, every step once in the log, nothing half-written."""
    found = load_checkpoint(folder)
    assert found.step == expected.step == 12
    for name, tensor in expected.weights.items():
        assert torch.equal(found.weights[name], tensor), name
    optimizer, other = (c.state["trainer"]["optimizer"]["state"] for c in (found, expected))
    assert len(optimizer) == len(other) > 0
    for key in other:
        for name, tensor in other[key].items():
            assert torch.equal(optimizer[key][name], tensor), (key, name)
    assert logged_steps(folder) == list(range(1, 13))
    assert not list(folder.rglob("*partial*"))


def logged_steps(folder) -> list[int]:
    return [line["step"] for line in read_metrics(folder) if "loss" in line]


# 1. What is no file, and waiting for ever.


def test_a_fifo_among_the_images_is_named_and_left_out(tmp_path):
    for number in range(12):
        Image.new("RGB", (20, 18), (20 * number, 0, 0)).save(tmp_path / f"{number}.png")
    os.mkfifo(tmp_path / "x.jpg")
    settings = {"data__source": "folder", "data__path": str(tmp_path), "data__workers": 1}
    done = run(small_arguments(tmp_path / "run", train__steps=3, **settings))
    assert done.returncode == 0, done.stdout
    assert f"Left out, being no readable files: 1 ({tmp_path}/x.jpg: FIFO)" in done.stdout
    assert "x.jpg: FIFO" in (tmp_path / "run" / "summary.md").read_text().split("Incidents")[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_obeyed_while_a_batch_does_not_come(undisturbed, tmp_path, number):
    """The worker is stopped for good, as one that reads from a dead file system is."""
    folder = tmp_path / "run"
    arguments = small_arguments(folder, data__workers=1)
    process = start(arguments, f"signal-worker={int(signal.SIGSTOP)},3")
    wait_until(lambda: len(logged_steps(folder)) >= 2, process)
    last = waits_at(folder)
    process.send_signal(number)
    asked = time.monotonic()
    done = finish(process)
    assert time.monotonic() - asked < 30  # 3 s of patience, on a machine that may be busy
    assert done.returncode == 0 and "Stopped and saved" in done.stdout, done.stdout
    assert load_checkpoint(folder).step == last + 1  # its figures are read a step later
    resume(folder)
    assert_as_if_nothing_happened(folder, undisturbed)


def waits_at(folder) -> int:
    """The last step in the log, once no more comes for two seconds."""
    while True:
        before = len(logged_steps(folder))
        time.sleep(2)
        if len(logged_steps(folder)) == before:
            return before


def test_a_rank_that_waits_for_data_lets_the_others_stop(undisturbed_on_two_ranks, tmp_path):
    folder = tmp_path / "run"
    arguments = small_arguments(folder, data__workers=1)
    process = start(arguments, "stop-worker-of-rank=1,3", ranks=2)
    wait_until(lambda: len(logged_steps(folder)) >= 2, process)
    waits_at(folder)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on
    done = finish(process)
    assert "Stopped and saved" in done.stdout, done.stdout
    assert load_checkpoint(folder).step >= 3
    assert finish(start(["--resume", str(folder)], ranks=2)).returncode == 0
    assert_as_if_nothing_happened(folder, undisturbed_on_two_ranks)


# 2. Killed before there is a checkpoint.


def test_a_kill_in_the_first_save_is_no_dead_end(undisturbed, tmp_path):
    folder = tmp_path / "run"
    arguments = small_arguments(folder, monitor__every=6)
    assert run(arguments, "kill-in-first-save").returncode == -signal.SIGKILL
    assert list(folder.glob("checkpoints/.step-00000004.partial/*"))
    refused = run(["--resume", str(folder)])
    assert refused.returncode == 1
    assert f"Start it again as before; with --train.output {folder}" in refused.stdout
    again = run(arguments)
    assert again.returncode == 0, again.stdout
    assert_as_if_nothing_happened(folder, undisturbed)
    panels = [line["step"] for line in read_metrics(folder) if "cosine" in line]
    assert panels == [0, 6, 12]


# 3. A full disk.


@pytest.fixture
def small_disk(tmp_path):
    """A prefix of commands that run beside a file system of 4 MB mounted in their `disk` folder."""
    inside = f"mount -t tmpfs -o size=4m tmpfs {tmp_path} && cd {tmp_path} && exec"
    probe = ["unshare", "--map-root-user", "--mount", "sh", "-c", f'{inside} "$@"', "sh"]
    if subprocess.run([*probe, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    return probe


def on_small_disk(small_disk, arguments, fault, copy_to) -> subprocess.CompletedProcess:
    """A faulty run into `run` on the small disk, which is copied once the filler is gone."""
    command = " ".join(f"'{word}'" for word in [sys.executable, FAULTY, fault, *arguments])
    script = f"{command}; status=$?; rm -f filler; cp -r run {copy_to}; exit $status"
    imports = os.pathsep.join(map(os.path.abspath, sys.path))  # the folder will be another one
    return finish(
        subprocess.Popen(
            [*small_disk, "sh", "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": imports},
        )
    )


def test_a_disk_full_for_a_while_costs_one_save(small_disk, undisturbed, tmp_path_factory):
    out = tmp_path_factory.mktemp("copied")
    done = on_small_disk(small_disk, small_arguments("run"), "fill-disk=7,10", out)
    assert done.returncode == 0, done.stdout
    assert re.search(
        r"step 8: NOT SAVED, the next save will try again: step-00000008 needs [\d.]+ kB in "
        r"run/checkpoints, which has 0 bytes free", done.stdout
    ), done.stdout  # fmt: skip
    assert "Traceback" not in done.stdout
    assert_as_if_nothing_happened(out / "run", undisturbed)
    steps = sorted(path.name for path in (out / "run" / "checkpoints").glob("step-*"))
    assert steps == ["step-00000004", "step-00000012"]


def test_lines_of_the_log_outwait_a_full_disk(small_disk, tmp_path_factory):
    """More of them than the last block of the file has room for."""
    out = tmp_path_factory.mktemp("copied")
    arguments = small_arguments("run", train__steps=80, train__checkpoint_every=40)
    done = on_small_disk(small_disk, arguments, "fill-disk=5,75", out)
    assert done.returncode == 0, done.stdout
    told = "metrics.jsonl could not be written into run: No space left on device; 0 bytes are free"
    assert done.stdout.count(f": {told} there") == 2, done.stdout  # by its step, and not saved
    assert logged_steps(out / "run") == list(range(1, 81))
    assert load_checkpoint(out / "run").step == 80


def test_a_disk_full_at_the_end_is_told_by_the_exit_code(
    small_disk, undisturbed, tmp_path_factory
):
    out = tmp_path_factory.mktemp("copied")
    done = on_small_disk(small_disk, small_arguments("run"), "fill-disk=7,99", out)
    assert done.returncode == 1, done.stdout
    assert re.search(
        r"ijepa: error: step-00000012 needs [\d.]+ kB in run/checkpoints, which has 0 bytes free: "
        r"make room for [\d.]+ kB\nLast good: step 4, continue with\n  "
        r"ijepa pretrain --resume run", done.stdout
    ), done.stdout  # fmt: skip
    assert "Traceback" not in done.stdout
    assert load_checkpoint(out / "run").step == 4
    assert not list((out / "run").rglob("*partial*"))
    assert not list((out / "run").glob("*.png"))
    resume(out / "run")
    assert_as_if_nothing_happened(out / "run", undisturbed)


# 4. Two processes, one run.


def test_the_second_process_is_refused_and_a_kill_frees_the_run(undisturbed, tmp_path):
    folder = tmp_path / "run"
    arguments = small_arguments(folder, data__workers=1)
    first = start(arguments, f"signal-worker={int(signal.SIGSTOP)},5")  # trains, and stays
    try:
        wait_until(lambda: (folder / "checkpoints" / "latest").exists(), first)
        second = run(["--resume", str(folder)])
        assert second.returncode == 1
        assert f"{folder} is being trained by process {first.pid} on " in second.stdout
        assert "Traceback" not in second.stdout
        both = run(["--resume", str(folder)], ranks=2)
        assert both.returncode == 1 and f"by process {first.pid} on " in both.stdout
        # Only the run itself is killed: what it started must not keep the lock.
        first.kill()
        first.wait()
        resume(folder)
    finally:
        kill_session(first)
    assert_as_if_nothing_happened(folder, undisturbed)


# 5. The log and the checkpoints.


def test_what_a_checkpoint_covers_is_in_the_log(undisturbed, tmp_path):
    folder = tmp_path / "run"
    done = run(small_arguments(folder), "kill-after-save=8")
    assert done.returncode == -signal.SIGKILL
    assert load_checkpoint(folder).step == 8
    assert logged_steps(folder) == list(range(1, 9))
    resume(folder)
    assert_as_if_nothing_happened(folder, undisturbed)


# 6. Numbers that are not finite.


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.image-mean", "inf", "0", "0"], "image_mean must lie in"),
        (["--model.image-std", "1e308", "1", "1"], "image_std must lie in"),
        (["--schedule.peak-lr", "1e308"], "peak_lr must lie in"),
        (["--schedule.final-weight-decay", "1e308"], "final_weight_decay must lie in"),
    ],
)
def test_numbers_beyond_sense_end_the_program_first(arguments, expected, capsys, monkeypatch):
    monkeypatch.setattr("ijepa.train.pretrain.pretrain", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["pretrain", *arguments])
    assert stopped.value.code == 2
    assert expected in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_run_whose_features_are_not_finite_ends_with_its_files(tmp_path, monkeypatch, capsys):
    features = panel.encoder_features

    def not_finite(*arguments):
        return dataclasses.replace(found := features(*arguments), last=found.last * torch.nan)

    monkeypatch.setattr(panel, "encoder_features", not_finite)
    settings = {"train__steps": 2, "monitor__every": 1, "monitor__evaluate": True}
    assert cli.main(["pretrain", *small_arguments(tmp_path / "run", **settings)]) == 0
    assert "step 1: target features of 16 images are not finite" in capsys.readouterr().out
    assert (tmp_path / "run" / "summary.md").exists()
    assert [line.get("not_finite") for line in read_metrics(tmp_path / "run")].count(16) == 3


# 7. Processes that die.


def test_a_killed_data_worker_is_replaced_once(undisturbed, tmp_path):
    folder = tmp_path / "run"
    arguments = small_arguments(folder, data__workers=2)
    done = run(arguments, f"signal-worker={int(signal.SIGKILL)},3")
    assert done.returncode == 0, done.stdout
    assert re.search(r"a data worker died \(.+\): new ones make its batches", done.stdout)
    assert_as_if_nothing_happened(folder, undisturbed)


def test_a_second_killed_worker_ends_the_run_saved(undisturbed, tmp_path):
    folder = tmp_path / "run"
    arguments = small_arguments(folder, data__workers=1, train__checkpoint_every=100)
    done = run(arguments, f"signal-worker={int(signal.SIGKILL)},2,6")
    assert done.returncode == 1
    assert "ijepa: error: a data worker died for the second time" in done.stdout
    assert "Traceback" not in done.stdout
    step = load_checkpoint(folder).step
    assert 6 <= step < 12 and logged_steps(folder) == list(range(1, step + 1))
    resume(folder)
    assert_as_if_nothing_happened(folder, undisturbed)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_and_the_run_goes_on(undisturbed_on_two_ranks, tmp_path, rank):
    folder = tmp_path / "run"
    done = run(small_arguments(folder), f"kill-rank={rank},6", ranks=2)
    assert done.returncode == 1
    assert re.search(
        rf"ijepa: error: lost rank {rank} \(process \d+ on .*, killed or crashed\)", done.stdout
    ), done.stdout
    assert "gloo" not in done.stdout
    # The first rank saves what it has; where it is the one that is gone, the last save stands.
    step = load_checkpoint(folder).step
    assert step == 4 if rank == 0 else 5 <= step <= 6
    assert logged_steps(folder)[:step] == list(range(1, step + 1))
    assert finish(start(["--resume", str(folder)], ranks=2)).returncode == 0
    assert_as_if_nothing_happened(folder, undisturbed_on_two_ranks)


# 8. Recipe files.


def test_recipe_files_of_other_editors(tmp_path, monkeypatch, capsys):
    started = []

    def record(recipe, **_others):
        started.append(recipe)
        return Outcome(tmp_path, finished=True)

    monkeypatch.setattr("ijepa.train.pretrain.pretrain", record)
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "latin.toml").write_text("# Größe\n", encoding="latin-1")
    assert cli.main(["pretrain", str(folder / "latin.toml")]) == 1
    assert f"{folder}/latin.toml is not UTF-8" in capsys.readouterr().err
    (folder / "mine.toml").write_text('base = "shapes-tiny"\n[train]\nseed = 7\n', "utf-8-sig")
    (folder / "more.toml").write_text('base = "mine.toml"\n')
    monkeypatch.chdir(tmp_path)
    assert cli.main(["pretrain", "recipes/more.toml"]) == 0
    assert started[0].train.seed == 7
