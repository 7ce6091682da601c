"""Pictures of a run: masks on images, and curves."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa.masks.batch import MaskBatch
from ijepa.visualize import draw_mask_examples


@pytest.fixture
def batch():
    images = torch.randint(0, 200, (3, 3, 16, 24), dtype=torch.uint8)
    masks = MaskBatch.from_lists(
        [[0, 1], [5], [2, 3, 4]], [[[7, 8], [8, 9]], [[0], [1]], [[23], [22]]], grid=(4, 6)
    )
    return images, masks


def test_context_and_targets_are_where_the_masks_say(batch):
    images, masks = batch
    sheet = draw_mask_examples(images, masks, count=2, height=64)  # zoom 4: pictures 64 x 96
    assert sheet.shape == (3 * 64 + 2 * 6, 2 * 96 + 6, 3) and sheet.dtype == np.uint8
    whole = images[0].permute(1, 2, 0).numpy().repeat(4, axis=0).repeat(4, axis=1)
    assert np.array_equal(sheet[:64, :96], whole)
    context, targets = sheet[70:134, :96], sheet[140:, :96]
    assert np.array_equal(context[:16, :32], whole[:16, :32])  # patches 0 and 1
    assert (context[16:] > 200).all()  # the rest is veiled
    # block 0 of image 0 is patches 7 and 8: row 1, columns 1 and 2; block 1 covers 8 and 9
    inside = targets[20:28, 20:28]
    assert np.array_equal(inside, whole[20:28, 20:28])
    assert tuple(targets[16, 17]) == (226, 88, 34) and tuple(targets[17, 63]) == (46, 134, 193)
    assert (targets[40:] > 170).all()


def test_grey_and_many_channels_are_drawn(batch):
    _, masks = batch
    for channels in (1, 5):
        images = torch.randint(0, 256, (3, channels, 16, 24), dtype=torch.uint8)
        sheet = draw_mask_examples(images, masks, height=16)
        assert sheet.shape[2] == 3
        assert np.array_equal(sheet[:16, :24, 0], images[0, 0].numpy())


def lines():
    metrics = [{"step": s, "loss": 1 / s, "lr": 1e-3, "grad_norm": 2.0} for s in range(1, 60)]
    panel = {"effective_rank": 3.0, "feature_std": 0.1, "lowest_std": 0.01, "cosine": 0.5}
    knn = {"knn": 0.3, "knn_guessing": 0.1}
    return [*metrics, {"step": 30, **panel, **knn}, {"step": 59, **panel, **knn}]


@pytest.mark.parametrize("metrics", [lines(), lines()[:59], []], ids=["all", "no panel", "none"])
def test_curves_are_drawn_whatever_is_there(batch, metrics, tmp_path):
    pytest.importorskip("matplotlib")
    from ijepa.visualize.curves import plot_curves

    sheet = draw_mask_examples(*batch)
    plot_curves(metrics, tmp_path / "curves.png", title="run", mask_examples=sheet)
    opened = Image.open(tmp_path / "curves.png")
    assert opened.info["Title"] == "run"
    picture = np.asarray(opened.convert("RGB"))
    assert picture.shape[1] > 1000
    blue = np.abs(picture.astype(int) - [0x2E, 0x86, 0xC1]).sum(axis=2) < 12  # the loss's line
    assert bool(blue[: len(picture) // 4].any()) == bool(metrics)


def test_the_line_of_guessing_is_the_panels_own(monkeypatch, tmp_path):
    """Not that of the closing probes, which see other images."""
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    from ijepa.visualize.curves import plot_curves

    drawn = []
    monkeypatch.setattr(Axes, "axhline", lambda _axis, y, **_style: drawn.append(y))
    plot_curves(lines(), tmp_path / "curves.png", title="run")
    assert [y for y in drawn if y] == [pytest.approx(10.0)]
    plot_curves(lines()[:59], tmp_path / "curves.png", title="run")
    assert len([y for y in drawn if y]) == 1


def test_the_readme_shows_the_picture_of_a_run_as_the_demo_names_it():
    picture = Image.open(Path(__file__).parent.parent / "docs" / "demo.png")
    assert picture.info["Title"] == "shapes-tiny-001"


def test_the_running_mean_is_that_of_the_last_values():
    pytest.importorskip("matplotlib")
    from ijepa.visualize.curves import running_mean

    values = np.random.default_rng().standard_normal(20)
    expected = [values[max(i - 4, 0) : i + 1].mean() for i in range(20)]
    np.testing.assert_allclose(running_mean(values, 5), expected, atol=1e-12)
