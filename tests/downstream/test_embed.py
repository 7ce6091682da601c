"""`ijepa embed` and `ijepa neighbours`: files to features, on any number of ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import photographs, small_recipe

import ijepa
from ijepa import cli
from ijepa.data import folder_source
from ijepa.data.identity import source_identity
from ijepa.downstream.feature_files import DESCRIPTION, FEATURES, NAMES, read_features
from ijepa.downstream.neighbours import nearest
from ijepa.train.pretrain import pretrain

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IJEPA_CACHE", str(folder / "cache"))
        pretrain(small_recipe(folder / "run", train__steps=2, model__depth=5))
    return folder / "run"


@pytest.fixture
def photos(tmp_path):
    """30 readable images and three that are not."""
    folder = tmp_path / "photos"
    torch.manual_seed(0)
    photographs(folder, 30)
    (folder / "class-0" / "a broken one.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    (folder / "class-1" / "empty.png").write_bytes(b"")
    (folder / "zz.gif").write_bytes(b"GIF89a")
    return folder


def contents(folder):
    return {name: (folder / name).read_bytes() for name in (FEATURES, NAMES, DESCRIPTION)}


def test_every_readable_image_has_its_features(run, photos, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["embed", str(run), str(photos), "--out", str(out), "--batch-size", "7",
               "--layers", "last4", "--workers", "0"]  # fmt: skip
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "embedding 33/33" in shown and "0:00 left" in shown
    assert "30 images" in shown and "3 could not be read" in shown
    assert "class-1/empty.png: empty file" in shown
    features, names, described = read_features(out)
    source = folder_source(photos)
    expected = [source.name(i).removeprefix(f"{photos}/") for i in range(len(source))]
    unreadable = {"class-0/a broken one.jpg", "class-1/empty.png", "zz.gif"}
    assert names == [name for name in expected if name not in unreadable]
    assert set(described["unreadable"]) == unreadable
    encoder = ijepa.load_pretrained(run)
    images = encoder.preprocess([photos / name for name in names])
    torch.testing.assert_close(torch.tensor(features), encoder.embed(images, "last4"))
    assert described["layers"] == "last4" and described["width"] == 64
    assert described["source"] == str(run)
    before = contents(out)
    assert cli.main(command) == 0  # all is there: nothing is computed again
    assert "embedding" not in capsys.readouterr().out
    assert contents(out) == before


def test_workers_and_sizes(run, photos, tmp_path):
    """As many workers as one likes give the same bytes; another size gives other features."""
    outs = {}
    for name, options in {
        "none": ["--workers", "0"],
        "two": ["--workers", "2"],
        "larger": ["--image-size", "24"],
    }.items():
        outs[name] = tmp_path / name
        assert cli.main(["embed", str(run), str(photos), "--out", str(outs[name]), *options]) == 0
    assert contents(outs["two"]) == contents(outs["none"])
    assert not np.allclose(read_features(outs["larger"])[0], read_features(outs["none"])[0])


def test_ranks_share_the_images(run, photos, tmp_path):
    embed = ["embed", str(run), str(photos), "--batch-size", "4", "--device", "cpu", "--out"]
    assert cli.main([*embed, str(tmp_path / "one")]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", "2", "-m", "ijepa.cli"]  # fmt: skip
    done = subprocess.run(
        [*torchrun, *embed, str(tmp_path / "two")],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    features, names, described = read_features(tmp_path / "two")
    expected, expected_names, expected_described = read_features(tmp_path / "one")
    assert names == expected_names and described == expected_described
    # The sums of one thread are not ordered as those of two.
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


def test_killed_and_started_again_it_ends_with_the_same_bytes(run, photos, tmp_path):
    command = [sys.executable, "-m", "ijepa.cli", "embed", str(run), str(photos),
               "--batch-size", "1", "--workers", "0", "--out"]  # fmt: skip
    slow = (  # commits after every image, and waits a little, so that a kill finds it at work
        "import sys, time; from ijepa import cli; import ijepa.downstream.embed as e; "
        "e._SECONDS_BETWEEN_COMMITS = 0; "
        "f = e.FeatureFiles.commit; "
        "e.FeatureFiles.commit = lambda s, complete=False: (f(s, complete), time.sleep(.05)); "
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}
    out = tmp_path / "killed"
    for _ in range(2):
        begun = done_images(out)
        process = subprocess.Popen(
            [sys.executable, "-c", slow, *command[3:], str(out)], env=environment
        )
        while done_images(out) < begun + 8 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 16 <= done_images(out) < 33
    assert cli.main([*command[3:], str(out)]) == 0
    assert cli.main([*command[3:], str(tmp_path / "whole")]) == 0
    assert contents(out) == contents(tmp_path / "whole")


def done_images(out):
    path = out / DESCRIPTION
    return json.loads(path.read_text())["done"] if path.exists() else 0


def test_mistakes_are_named(run, photos, tmp_path, capsys):
    out = str(tmp_path / "out")
    for arguments, expected in (
        ([str(tmp_path / "none"), str(photos)], "nothing at"),
        ([str(run), str(tmp_path / "none")], "no folder"),
        ([str(run), str(photos), "--image-size", "18"], "18x18 pixels are no whole patches"),
    ):
        assert cli.main(["embed", *arguments, "--out", out]) == 1
        assert expected in capsys.readouterr().err
    assert cli.main(["embed", str(run), str(photos), "--out", str(photos / "x")]) == 1
    assert "lies in the folder of the images" in capsys.readouterr().err
    lost = tmp_path / "lost"
    lost.mkdir()
    (lost / "a.png").write_bytes(b"")
    assert cli.main(["embed", str(run), str(lost), "--out", out]) == 1
    assert "none of 1 images could be read, as a.png: empty file" in capsys.readouterr().err


def test_an_image_that_changes_changes_the_identity(photos):
    before = source_identity(folder_source(photos))
    assert source_identity(folder_source(photos)) == before
    moved = photos.rename(photos.with_name("moved"))
    assert source_identity(folder_source(moved)) == before
    Image.new("RGB", (20, 20)).save(moved / "class-0" / "0.png")
    assert source_identity(folder_source(moved)) != before


def test_the_nearest_are_those_of_the_highest_centred_cosine(monkeypatch):
    monkeypatch.setattr("ijepa.downstream.neighbours._ROWS_AT_ONCE", 7)
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(40, 6)) + 5).astype(np.float32)
    query = rng.normal(size=6) + 5
    mean = features.astype(np.float64).mean(axis=0)
    cosines = [
        (row - mean) @ (query - mean) / np.linalg.norm(row - mean) / np.linalg.norm(query - mean)
        for row in features.astype(np.float64)
    ]
    found = nearest(features, query, 5)
    assert [n.row for n in found] == list(np.argsort(cosines)[::-1][:5])
    assert [n.cosine for n in found] == pytest.approx(sorted(cosines)[::-1][:5], rel=1e-9)
    with pytest.raises(ValueError, match=r"features \(n, D\) and a query \(D,\) expected"):
        nearest(features, query[:4], 5)


def test_neighbours_are_printed_and_drawn(run, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["embed", str(run), str(photos), "--out", str(out)]) == 0
    copy = tmp_path / "query.png"
    copy.write_bytes((photos / "class-1/3.png").read_bytes())
    capsys.readouterr()
    assert cli.main(["neighbours", str(out), str(copy), "--count", "7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["1", "+1.000", "class-1/3.png"]
    assert len(lines) == 8 and "neighbours.png" in lines[-1]
    with Image.open(out / "neighbours.png") as sheet:
        assert sheet.size[0] > 6 * 160 and sheet.size[1] > 2 * 160
    assert cli.main(["neighbours", str(out), str(photos / "class-1/3.png")]) == 0
    assert "class-1/3.png" not in capsys.readouterr().out  # itself is no news
    (tmp_path / "none.png").write_bytes(b"")
    assert cli.main(["neighbours", str(out), str(tmp_path / "none.png")]) == 1
    assert "the query cannot be read" in capsys.readouterr().err


def test_neighbours_by_another_encoder_are_refused(run, photos, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert cli.main(["embed", str(run), str(photos), "--out", str(out)]) == 0
    monkeypatch.setenv("IJEPA_CACHE", str(tmp_path / "cache"))
    pretrain(small_recipe(tmp_path / "other", train__steps=1, train__seed=5))
    query = str(photos / "class-1/3.png")
    arguments = ["neighbours", str(out), query, "--source", str(tmp_path / "other")]
    assert cli.main(arguments) == 1
    assert "is not the encoder that made the features" in capsys.readouterr().err
