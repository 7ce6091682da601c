"""Online probes: they see a signal, change no weight, and choose the checkpoint that is kept."""

import json

import pytest
import torch
from small_runs import photographs, small_recipe

import ijepa
from ijepa.evaluate.learning import Learning
from ijepa.evaluate.online import OnlineScores, online_line, online_scores
from ijepa.report.metrics import read_metrics
from ijepa.train import online
from ijepa.train.checkpoint import BEST, find_checkpoint, load_checkpoint, read_metadata
from ijepa.train.pretrain import pretrain


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IJEPA_CACHE", str(tmp_path / "cache"))


def test_the_scores_see_a_signal_and_no_more():
    torch.manual_seed(0)
    labels = torch.randint(4, (400,))
    features = torch.randn(400, 8)
    features[:, :4] += 6 * torch.nn.functional.one_hot(labels, 4)
    noise = torch.randint(4, (400,))
    scores = online_scores(features, {"signal": labels, "noise": noise})
    assert scores["signal"].linear > 0.95 and scores["signal"].knn > 0.95
    assert scores["noise"].linear < 0.45 and scores["noise"].knn < 0.45
    assert 0.1 < scores["noise"].guessing < 0.45
    features[3, 2] = float("nan")
    assert online_scores(features, {"signal": labels}) == {}
    with pytest.raises(ValueError, match="at least 8 labelled images, got 7"):
        online_scores(torch.randn(7, 3), {"a": torch.zeros(7)})
    line = online_line(6, {"a": OnlineScores(0.5, 0.25, 0.125)})
    assert line == "step 6: online probes of a: linear 50.0 %, kNN 25.0 % (guessing 12.5 %)"


def test_no_weight_knows_that_it_was_looked_at(tmp_path):
    settings = {"train__steps": 7, "data__num_images": 40}
    pretrain(small_recipe(tmp_path / "without", **settings))
    pretrain(small_recipe(tmp_path / "with", monitor__every=2, **settings))
    without, looked = (load_checkpoint(tmp_path / name) for name in ("without", "with"))
    assert without.step == looked.step == 7
    for name, value in without.weights.items():
        assert torch.equal(value, looked.weights[name]), name
    mine, theirs = (c.state["trainer"] for c in (without, looked))
    assert str(mine) == str(theirs)
    lines = [m for m in read_metrics(tmp_path / "with") if "online_linear" in m]
    assert [m["step"] for m in lines] == [0, 2, 4, 6, 7]
    assert all(0 <= m["online_linear"] <= 1 and 0 <= m["online_knn"] <= 1 for m in lines)
    assert not any("online_linear" in m for m in read_metrics(tmp_path / "without"))


def test_of_several_tasks_each_is_told(tmp_path):
    settings = {"train__steps": 2, "monitor__every": 2, "data__source": "scenes"}
    pretrain(small_recipe(tmp_path / "run", **settings))
    last = [m for m in read_metrics(tmp_path / "run") if "online_linear" in m][-1]
    mean = (last["online_linear_count"] + last["online_linear_distance"]) / 2
    assert last["online_linear"] == pytest.approx(mean)


def scripted(monkeypatch, values):
    """Probes that say these values, one a look."""
    said = iter(values)
    monkeypatch.setattr(
        online,
        "online_scores",
        lambda features, labels: {"shape": OnlineScores(next(said), 0.0, 0.0)},
    )


def best(run):
    return read_metadata(run / "checkpoints" / BEST)


def test_the_best_weights_are_kept(tmp_path, monkeypatch):
    scripted(monkeypatch, [0.9, 0.2, 0.4, 0.3, 0.4])  # the one before the first step is no weight
    settings = {"monitor__every": 2, "train__checkpoint_every": 2}
    pretrain(small_recipe(tmp_path / "run", train__steps=8, **settings))
    kept = best(tmp_path / "run")
    assert kept["step"] == 4 and kept["score"] == {"figure": "online_linear", "value": 0.4}
    pretrain(small_recipe(tmp_path / "short", train__steps=4, schedule__total_steps=8,
                          monitor__every=0))  # fmt: skip
    at_four = load_checkpoint(tmp_path / "short")
    weights = load_checkpoint(tmp_path / "run" / "checkpoints" / BEST).weights
    assert all(torch.equal(weights[name], value) for name, value in at_four.weights.items())
    encoder = ijepa.load_pretrained(tmp_path / "run" / "checkpoints" / BEST)
    assert torch.equal(encoder.norm.bias, weights["target_encoder.norm.bias"])
    assert find_checkpoint(tmp_path / "run").name == "step-00000008"  # the run goes on from there


def test_a_resumed_run_knows_its_best(tmp_path, monkeypatch):
    settings = {"monitor__every": 2, "train__checkpoint_every": 4, "schedule__total_steps": 12}
    scripted(monkeypatch, [0.0, 0.5, 0.1])
    pretrain(small_recipe(tmp_path / "run", train__steps=4, **settings))
    assert best(tmp_path / "run")["step"] == 2
    scripted(monkeypatch, [0.4, 0.45])
    checkpoint = load_checkpoint(tmp_path / "run")
    pretrain(small_recipe(tmp_path / "run", train__steps=8, **settings), checkpoint=checkpoint)
    assert best(tmp_path / "run")["step"] == 2
    scripted(monkeypatch, [0.6])
    checkpoint = load_checkpoint(tmp_path / "run")
    pretrain(small_recipe(tmp_path / "run", train__steps=10, **settings), checkpoint=checkpoint)
    assert best(tmp_path / "run")["step"] == 10
    described = json.loads((tmp_path / "run/checkpoints/best/checkpoint.json").read_text())
    assert described["score"]["value"] == 0.6


def test_without_labels_a_figure_of_the_panel_chooses(tmp_path, monkeypatch):
    shares = iter([0.9, 0.2, 0.3, 0.25])
    monkeypatch.setattr(
        "ijepa.train.panel.measure_learning",
        lambda *_: Learning(next(shares), 0.5, 0.2, 0.3, 1.0),
    )
    settings = photographs(tmp_path / "photos", 12, classes=1)
    pretrain(small_recipe(tmp_path / "run", train__steps=6, monitor__every=2, **settings))
    kept = best(tmp_path / "run")
    assert kept["step"] == 4 and kept["score"]["figure"] == online.LABEL_FREE
    assert not any("online_linear" in m for m in read_metrics(tmp_path / "run"))


def test_they_can_be_turned_off(tmp_path):
    pretrain(small_recipe(tmp_path / "run", train__steps=2, monitor__every=2,
                          monitor__online_images=0))  # fmt: skip
    assert not any("online_linear" in m for m in read_metrics(tmp_path / "run"))


def test_a_full_disk_costs_the_best_alone(tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ijepa.train.saving.write_checkpoint", full)
    pretrain(small_recipe(tmp_path / "run", train__steps=2, monitor__every=2))
    assert load_checkpoint(tmp_path / "run").step == 2
    assert not (tmp_path / "run" / "checkpoints" / BEST).exists()


def test_what_is_best_cannot_be_trained_on(tmp_path):
    pretrain(small_recipe(tmp_path / "run", train__steps=2, monitor__every=2))
    kept = load_checkpoint(tmp_path / "run" / "checkpoints" / BEST)
    with pytest.raises(ValueError, match="holds weights alone, those that scored best"):
        pretrain(small_recipe(tmp_path / "run", train__steps=2, monitor__every=2), checkpoint=kept)
