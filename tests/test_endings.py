"""How runs end: with their report, with the last good checkpoint named, and never in silence."""

import pytest
import torch
from PIL import Image
from small_runs import small_arguments

from ijepa import cli
from ijepa.checkpoint import load_checkpoint
from ijepa.metrics import read_metrics


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path_factory, tmp_path, monkeypatch):
    """A cache of rendered images that all of these runs share, and a working folder of its own."""
    monkeypatch.setenv("IJEPA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.chdir(tmp_path)


def photographs(folder, count, classes=2):
    """`count` small images, in turn in one of so many class folders; one class is a flat folder."""
    for number in range(count):
        inside = folder / f"class-{number % classes}" if classes > 1 else folder
        inside.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (20, 24, 3)).byte().numpy()
        Image.fromarray(pixels).save(inside / f"{number}.png")
    return {"data__source": "folder", "data__path": str(folder)}


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

    monkeypatch.setattr("ijepa.run.closing_table", broken)
    arguments = small_arguments("run", train__steps=2, monitor__evaluate=True)
    assert cli.main(["pretrain", *arguments]) == 1
    assert "out of memory" in capsys.readouterr().err
    assert "| learning rate |" in (tmp_path / "run" / "summary.md").read_text()
    assert (tmp_path / "run" / "curves.png").exists()
