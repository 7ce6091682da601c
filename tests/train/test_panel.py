"""The panel of real runs: a recipe that learns nothing is told so, the demo's is not."""

import pytest
import torch
from rich.console import Console

from ijepa.evaluate import warnings
from ijepa.recipes import load_recipe
from ijepa.report.metrics import read_metrics
from ijepa.train.pretrain import pretrain

RELEASED = {"model.init": "released", "model.target_norm": "layer"}


@pytest.fixture(autouse=True)
def one_thread():
    """Steps this small wait for a second thread longer than it saves where others are at work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(folder, steps, **overrides):
    """What a short form of the demo shows, and its last panel."""
    recipe = load_recipe(
        "shapes-tiny",
        {
            "data.num_images": 2000, "data.num_held_out": 20, "train.steps": steps,
            "train.output": str(folder / "run"), "train.device": "cpu", "monitor.every": steps,
            "monitor.evaluate": False, **overrides,
        },
    )  # fmt: skip
    console = Console(record=True, width=300, force_terminal=False)
    pretrain(recipe, console=console)
    panel = [line for line in read_metrics(folder / "run") if "r2" in line][-1]
    return console.export_text(), panel, (folder / "run" / "summary.md").read_text()


def test_targets_that_a_whole_image_shares_are_warned_of(tmp_path, monkeypatch):
    """std .02, LayerNorm, narrow: what this project's own demo did for long."""
    monkeypatch.setattr(warnings, "FIRST_STEP", 250)
    shown, panel, summary = run(tmp_path, 250, **RELEASED)
    assert panel["image_share"] > warnings.HIGHEST_IMAGE_SHARE
    assert "warning: " in shown and "shared by all patches of an image" in shown
    assert "try --model.target-norm instance" in shown
    assert "**Warning:**" in summary


def test_the_demos_recipe_is_warned_of_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(warnings, "FIRST_STEP", 800)
    shown, panel, summary = run(tmp_path, 800)
    assert panel["r2"] > warnings.LOWEST_R2
    assert panel["interaction_share"] == pytest.approx(
        1 - panel["position_share"] - panel["image_share"]
    )
    assert "warning:" not in shown and "**Warning:**" not in summary
