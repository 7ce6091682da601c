"""`ijepa eval finetune`: every preset end to end, resumed bit by bit, its classifier opened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import task_files
import torch
from small_runs import photographs, small_recipe

import ijepa
from ijepa import cli
from ijepa.downstream.finetune import run as finetune_run
from ijepa.downstream.finetune.presets import PRESETS
from ijepa.downstream.finetune.trainer import FinetuneTrainer
from ijepa.downstream.options import EncoderOptions, FinetuneOptions
from ijepa.train.checkpoint import CheckpointError, load_checkpoint
from ijepa.train.pretrain import pretrain

ROOT = Path(__file__).parents[3]
ON_THE_SPOT = EncoderOptions(workers=0, device="cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fine-tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IJEPA_CACHE", str(folder / "cache"))
        settings = photographs(folder / "photos", 12, classes=1)
        pretrain(small_recipe(folder / "run", train__steps=2, model__depth=3, **settings))
    return str(folder / "run")


@pytest.fixture
def folder(tmp_path):
    return task_files.class_folders(tmp_path / "data", classes=4, each=15)


def options(run, folder, output, **others):
    given = {"preset": "small", "epochs": 4, "step_images": 12, "save_every": 3, **others}
    return FinetuneOptions(
        source=run, data="folder", path=folder, encoder=ON_THE_SPOT, output=output, **given
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_end_to_end(preset, run, folder, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["eval", "finetune", run, "--data", "folder", "--path", str(folder), "--preset",
               preset, "--epochs", "2", "--step-images", "12", "--workers", "0", "--output",
               str(out), "--image-size", "24", "--batch-size", "5"]  # fmt: skip
    assert cli.main(command) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "fine-tuning 8/8" in shown and "loss" in shown and "95 % interval" in shown
    result = json.loads((out / "result.json").read_text())
    settings = result["settings"]
    assert settings["rand_augment"] == PRESETS[preset].rand_augment
    assert settings["lr"] == pytest.approx(PRESETS[preset].lr * 12 / PRESETS[preset].step_images)
    classifier = ijepa.load_pretrained(out)
    assert classifier.class_names == ("class-0", "class-1", "class-2", "class-3")
    assert classifier.config.image_size == (24, 24)
    images = classifier.preprocess(folder / "class-2" / "3.png")
    assert classifier.classify(images).shape == (1, 4) and not classifier.training
    assert classifier.embed(images).shape == (1, 16)
    assert not any(p.requires_grad for p in classifier.parameters())
    with pytest.raises(CheckpointError, match=r"fine-tuned classifier: ijepa\.load_pretrained"):
        ijepa.load_run(out)


def test_it_learns_and_scores_what_it_saved(run, folder, tmp_path):
    done = finetune_run.finetune(
        options(run, folder, tmp_path / "out", epochs=20, lr=5e-3, drop_path=0.0)
    )
    accuracy = done.result.best.accuracy
    assert accuracy > 0.6  # brightness tells the classes
    classifier = ijepa.load_pretrained(tmp_path / "out")
    bench = finetune_run.open_bench(options(run, folder, None))
    names = [bench.task.test.source.name(i) for i in range(len(bench.task.test))]
    predicted = classifier.classify(classifier.preprocess(names)).argmax(dim=1)
    right = (predicted == torch.from_numpy(bench.task.test.labels)).double().mean().item()
    assert right == pytest.approx(accuracy)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 80 and losses[-1] < 0.8 * losses[0]


def weights_of(folder):
    return load_checkpoint(folder).weights


def test_a_resumed_run_is_the_run_bit_by_bit(run, folder, tmp_path, monkeypatch):
    strong = {"mixup": 0.8, "cutmix": 1.0, "drop_path": 0.3, "rand_augment": "rand-m9-mstd0.5-inc1"}
    finetune_run.finetune(options(run, folder, tmp_path / "whole", **strong))
    steps = FinetuneTrainer.step

    def dies(self, parts):
        if self.done == 10:
            raise KeyboardInterrupt
        return steps(self, parts)

    monkeypatch.setattr(FinetuneTrainer, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        finetune_run.finetune(options(run, folder, tmp_path / "cut", **strong))
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "cut").step == 9
    torch.manual_seed(123)  # another process
    moved = folder.rename(folder.with_name("moved"))
    done = finetune_run.resume(tmp_path / "cut", path=moved, workers=1)
    whole, cut = weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut")
    assert set(whole) == set(cut)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert done.result.settings["steps"] == 16
    lines = [
        (tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "cut")
    ]
    assert lines[0] == lines[1]


def test_micro_batches_change_nothing_but_rounding(run, folder, tmp_path):
    plain = {"drop_path": 0.0, "epochs": 2}
    finetune_run.finetune(options(run, folder, tmp_path / "one", **plain))
    parts = options(run, folder, tmp_path / "parts", **plain)
    small = EncoderOptions(workers=0, device="cpu", batch_size=5)
    finetune_run.finetune(FinetuneOptions(**{**parts.__dict__, "encoder": small}))
    one, many = weights_of(tmp_path / "one"), weights_of(tmp_path / "parts")
    for name in one:
        torch.testing.assert_close(one[name], many[name], rtol=1e-3, atol=1e-4)


def test_ctrl_c_saves_and_says_how_to_go_on(run, folder, tmp_path):
    command = [sys.executable, "-m", "ijepa.cli", "eval", "finetune", run, "--data", "folder",
               "--path", str(folder), "--preset", "small", "--epochs", "100000", "--workers", "1",
               "--output", str(tmp_path / "out")]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    metrics = tmp_path / "out" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert f"ijepa eval finetune --resume {tmp_path / 'out'}" in shown
    step = load_checkpoint(tmp_path / "out").step
    assert step == json.loads(metrics.read_text().splitlines()[-1])["step"] > 0


def test_a_loss_that_is_not_finite_stops_before_the_update(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "ijepa.downstream.finetune.trainer.soft_cross_entropy",
        lambda logits, targets: logits.sum() * float("nan"),
    )
    with pytest.raises(RuntimeError, match="the loss of step 1 is not finite: try a lower --lr"):
        finetune_run.finetune(options(run, folder, tmp_path / "out"))
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_few_labels(run, folder, tmp_path):
    done = finetune_run.finetune(options(run, folder, tmp_path / "few", per_class=3, seed=4))
    assert done.result.train_images == 12 and done.result.settings["per_class"] == 3
    bench = finetune_run.open_bench(options(run, folder, None))
    names = [bench.task.train.source.name(i) for i in range(48)]
    chosen = [n for n in names if n.endswith(("/0.png", "/7.png"))]
    unique = tmp_path / "unique"
    unique.mkdir()
    for name in names:
        kind, file = name.split("/")[-2:]
        (unique / kind).mkdir(exist_ok=True)
        (unique / kind / f"{kind}-{file}").write_bytes(Path(name).read_bytes())
    (tmp_path / "list.txt").write_text("\n".join("-".join(name.split("/")[-2:]) for name in chosen))
    listed = options(run, unique, tmp_path / "listed", list=tmp_path / "list.txt")
    task = finetune_run.labelled(finetune_run.open_bench(listed).task, listed)
    kept = {task.train.source.name(i).split("/")[-1] for i in range(len(task.train))}
    assert kept <= {"-".join(name.split("/")[-2:]) for name in chosen}


def test_another_number_of_classes_at_resume(run, folder, tmp_path):
    finetune_run.finetune(options(run, folder, tmp_path / "out", epochs=1))
    task_files.picture(folder / "class-4" / "0.png", 4, 4)
    task_files.picture(folder / "class-4" / "1.png", 4, 5)
    with pytest.raises(CheckpointError, match="other data: classes is 4 there and 5 here"):
        finetune_run.resume(tmp_path / "out")


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ({"per_class": 13}, "has 12 images, fewer than 13 labels a class"),
        ({"per_class": 1, "list": Path("x")}, "give --per-class or --list, not both"),
        ({"epochs": 0}, r"epochs must lie in \[1"),
        ({"drop_path": 1.0}, r"drop_path must lie in \[0, 1\)"),
        ({"save_every": 0}, "save_every must be at least 1"),
    ],
)
def test_mistakes_are_named(others, expected, run, folder, tmp_path):
    with pytest.raises(ValueError, match=expected):
        finetune_run.finetune(options(run, folder, tmp_path / "out", **others))


def test_a_folder_that_holds_a_run_is_not_taken(run, folder, tmp_path, capsys):
    finetune_run.finetune(options(run, folder, tmp_path / "out", epochs=1))
    with pytest.raises(ValueError, match="holds a run already: continue it with `ijepa eval"):
        finetune_run.finetune(options(run, folder, tmp_path / "out", epochs=1))
    assert cli.main(["eval", "finetune", "--resume", run]) == 1
    assert "is no checkpoint of fine-tuning" in capsys.readouterr().err
    assert cli.main(["eval", "finetune", "--resume", str(tmp_path / "out")]) == 0  # tests again
    assert "95 % interval" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_named(run, folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--output .*file/out cannot be made: Not a directory"):
        finetune_run.finetune(options(run, folder, tmp_path / "file" / "out"))


def test_a_classifier_is_fine_tuned_on(run, folder, tmp_path):
    """A source like any other: its head is replaced."""
    finetune_run.finetune(options(run, folder, tmp_path / "first", epochs=1))
    other = task_files.class_folders(tmp_path / "other", classes=2, each=10)
    done = finetune_run.finetune(options(str(tmp_path / "first"), other, tmp_path / "second"))
    assert done.result.classes == 2


def test_a_random_network_is_trained_at_one_rate(run, folder):
    assert finetune_run.settings_of(options(run, folder, None)).layer_decay == 0.75
    scratch = options(run, folder, None, random_network=True)
    assert finetune_run.settings_of(scratch).layer_decay == 1.0
    scratch = options(run, folder, None, random_network=True, layer_decay=0.5)
    assert finetune_run.settings_of(scratch).layer_decay == 0.5
