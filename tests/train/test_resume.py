"""A run that is stopped, killed or cut into parts ends with the very same bits."""

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from small_runs import small_arguments, small_recipe

from ijepa.recipes import recipe_from_dict
from ijepa.report.metrics import read_metrics
from ijepa.train.checkpoint import load_checkpoint
from ijepa.train.divergence import TooManySkips
from ijepa.train.figures import Figures
from ijepa.train.pretrain import pretrain
from ijepa.train.trainer import Trainer


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
def uninterrupted(tmp_path_factory, _cache):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert pretrain(small_recipe(folder)).finished
    return load_checkpoint(folder)


def resume(folder, **settings):
    """Go on in `folder`, as `--resume` does, with other settings that a resumed run may take."""
    checkpoint = load_checkpoint(folder)
    config = checkpoint.metadata["config"]
    for name, value in settings.items():
        table, _, key = name.partition("__")
        config[table][key] = value
    return pretrain(recipe_from_dict(config), checkpoint=checkpoint)


def assert_same_end(folder, expected):
    found = load_checkpoint(folder)
    assert found.step == expected.step == 12
    for name, tensor in expected.weights.items():
        assert torch.equal(found.weights[name], tensor), name
    optimizer, other = (c.state["trainer"]["optimizer"]["state"] for c in (found, expected))
    assert len(optimizer) == len(other) > 0
    for key in other:
        for name, tensor in other[key].items():
            assert torch.equal(optimizer[key][name], tensor), (key, name)


def test_training_moves_all_three_networks(uninterrupted, tmp_path):
    recipe = recipe_from_dict(uninterrupted.metadata["config"])
    from ijepa.train.from_recipe import build_model

    initial = build_model(recipe).state_dict()
    for network in ("context_encoder", "target_encoder", "predictor"):
        moved = [
            name
            for name, tensor in uninterrupted.weights.items()
            if name.startswith(network) and not torch.equal(tensor, initial[name])
        ]
        assert len(moved) > 5, network


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_rest_is_the_same(uninterrupted, tmp_path, monkeypatch, number):
    stop_at = random.randint(2, 10)
    observe = Figures.observe

    def observe_and_signal(self, late):
        observe(self, late)
        if late is not None and late.done == stop_at:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patched:
        patched.setattr(Figures, "observe", observe_and_signal)
        outcome = pretrain(small_recipe(tmp_path / "run"))
    assert not outcome.finished
    assert stop_at < load_checkpoint(tmp_path / "run").step <= stop_at + 2
    assert resume(tmp_path / "run").finished
    assert_same_end(tmp_path / "run", uninterrupted)
    steps = [line["step"] for line in read_metrics(tmp_path / "run")]
    assert steps == list(range(1, 13))


def test_kill_9_at_random_steps_changes_nothing(uninterrupted, tmp_path):
    """Twice, in the middle of whatever it was doing; with one worker, then two, then none."""
    folder = tmp_path / "run"
    # after the first checkpoint, of step 4: a line is in the log before its checkpoint is written
    first, second = random.randint(5, 6), random.randint(9, 10)
    kill_at_step(small_arguments(folder, data__workers=1), folder, first)
    kill_at_step(["--resume", str(folder), "--data.workers", "2"], folder, second)
    assert resume(folder, data__workers=0).finished
    assert_same_end(folder, uninterrupted)


def kill_at_step(arguments, folder, step):
    """Start `ijepa pretrain` and send SIGKILL once metrics.jsonl speaks of `step`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ijepa.cli", "pretrain", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if any(line["step"] >= step for line in read_metrics(folder)):
            break
        time.sleep(0.002)
    process.kill()
    output = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, output
    assert load_checkpoint(folder).step <= 12


def test_micro_batches_change_nothing_but_rounding(uninterrupted, tmp_path):
    pretrain(small_recipe(tmp_path / "run", train__accumulate=3))
    weights = load_checkpoint(tmp_path / "run").weights
    for name, tensor in uninterrupted.weights.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-4, rtol=1e-3)


def test_two_ranks_change_nothing_but_rounding(uninterrupted, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--master-port", str(random.randint(20_000, 60_000)), "-m", "ijepa.cli"]  # fmt: skip
    done = subprocess.run(
        [*command, "pretrain", *small_arguments(tmp_path / "run", monitor__every=6)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    weights = load_checkpoint(tmp_path / "run").weights
    for name, tensor in uninterrupted.weights.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-4, rtol=1e-3)
    lines = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 13))


def test_a_run_that_diverges_stops_names_the_step_and_keeps_a_checkpoint(
    tmp_path, monkeypatch
):
    accumulate = Trainer._accumulate

    def diverge(self, images, masks):
        loss = accumulate(self, images, masks)
        return loss * torch.nan if self.step_index >= 4 else loss

    monkeypatch.setattr(Trainer, "_accumulate", diverge)
    recipe = small_recipe(tmp_path / "run", optim__max_skipped_steps=2)
    with pytest.raises(TooManySkips, match=r"3 steps in a row, from step 5 on"):
        pretrain(recipe)
    weights = load_checkpoint(tmp_path / "run").weights
    assert all(tensor.isfinite().all() for tensor in weights.values())
    for line in read_metrics(tmp_path / "run"):
        json.loads(json.dumps(line), parse_constant=pytest.fail)  # neither NaN nor Infinity


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"data__num_images": 31}, "trained on other data: images is 32 there and 31 here"),
        ({"model__depth": 3}, "does not fit this run.*context_encoder.blocks.2"),
        ({"model__width": 32}, "does not fit this run.*has shape"),
        ({"train__steps": 11}, "is of step 12, beyond train.steps 11"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(uninterrupted, settings, expected):
    folder = uninterrupted.path.parent.parent
    with pytest.raises(ValueError, match=f"(?s){uninterrupted.path}.*{expected}"):
        resume(folder, **settings)


def test_from_python_too_it_stays_the_same_run(uninterrupted):
    """What may differ is a rule about runs, not about the command line."""
    saved = recipe_from_dict(copy.deepcopy(uninterrupted.metadata["config"]))
    other = replace(saved, optim=replace(saved.optim, max_grad_norm=2.5))
    with pytest.raises(ValueError, match=r"optim.max_grad_norm is .* cannot become 2.5"):
        pretrain(other, checkpoint=load_checkpoint(uninterrupted.path))


def test_a_longer_run_keeps_its_schedule(uninterrupted, tmp_path):
    pretrain(small_recipe(tmp_path / "run", train__steps=6, schedule__total_steps=12))
    assert resume(tmp_path / "run", train__steps=12).finished
    assert_same_end(tmp_path / "run", uninterrupted)


def test_bfloat16_weights_resume_from_their_masters(tmp_path):
    """Checkpoints hold float32 masters; the rounded weights follow from them."""
    settings = {"train__precision": "bf16-params"}
    pretrain(small_recipe(tmp_path / "whole", **settings))
    pretrain(small_recipe(tmp_path / "parts", train__steps=5, schedule__total_steps=12, **settings))
    resume(tmp_path / "parts", train__steps=12)
    whole = load_checkpoint(tmp_path / "whole")
    assert_same_end(tmp_path / "parts", whole)
    weights = [w for name, w in whole.weights.items() if name.endswith("qkv.weight")]
    assert weights and all(w.dtype == torch.float32 for w in weights)
    assert all(not torch.equal(w, w.bfloat16().float()) for w in weights)
