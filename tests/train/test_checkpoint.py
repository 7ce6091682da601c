"""Checkpoints: whole or not at all, and refused by name."""

import errno
import json
import os
import shutil

import pytest
import torch

from ijepa.disk import NotWritten
from ijepa.train import checkpoint as module
from ijepa.train.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

FILES = ("weights.safetensors", "trainer.safetensors", "checkpoint.json")


def write(folder, step=5, **changes):
    weights = {"predictor.mask_token": torch.randn(1, 1, 4), "a.b": torch.randn(3, 2).T}
    state = {
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "m": torch.randn(2)}, 7: {}}},
        "groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "on": True, "none": None}],
        "counter": torch.tensor(2**40 + 1),
        "bytes": torch.randint(0, 256, (16,), dtype=torch.uint8),
        "half": torch.randn(3).bfloat16(),
    }
    save_checkpoint(folder, step, weights, state, {"config": {"x": 1}, **changes})
    return weights, state


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    else:
        assert found == expected


def test_what_is_written_comes_back_bit_by_bit(tmp_path):
    weights, state = write(tmp_path, step=42, seconds=1.5)
    loaded = load_checkpoint(tmp_path)
    assert loaded.step == 42 and loaded.metadata["seconds"] == 1.5
    assert loaded.metadata["versions"]["torch"] == str(torch.__version__)
    assert_same(loaded.state, state)
    assert set(loaded.weights) == set(weights)
    for name, tensor in weights.items():
        assert_same(loaded.weights[name], tensor)


def test_a_tensor_that_is_saved_may_change_or_be_shared(tmp_path):
    tensor = torch.zeros(4)
    save_checkpoint(tmp_path, 1, {"a": tensor, "b": tensor[:2]}, {"c": tensor}, {})
    tensor += 1
    assert load_checkpoint(tmp_path).weights["b"].tolist() == [0, 0]


def test_the_last_two_are_kept_and_latest_points_to_the_newest(tmp_path):
    for step in (1, 2, 10):
        write(tmp_path, step)
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders == ["latest", "step-00000002", "step-00000010"]
    assert load_checkpoint(tmp_path).step == 10
    assert load_checkpoint(tmp_path / "checkpoints").step == 10
    assert load_checkpoint(tmp_path / "checkpoints" / "step-00000002").step == 2
    (tmp_path / "checkpoints" / "latest").write_text("step-00000002\n")
    assert load_checkpoint(tmp_path).step == 2


def test_a_run_that_goes_on_from_an_older_one_keeps_what_it_writes(tmp_path):
    """Step 6 was once dropped as it was written, 8 and 12 being newer, and `latest` named it."""
    for step in (8, 12, 6):
        write(tmp_path, step)
    assert load_checkpoint(tmp_path).step == 6
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders == ["latest", "step-00000006", "step-00000012"]


def test_what_a_resumed_run_began_with_outlives_what_it_has_left_behind(tmp_path):
    """The newest was damaged, the one before is gone on from and then dropped last."""
    for step in (4, 8):
        write(tmp_path, step)
    folders = tmp_path / "checkpoints"
    (folders / "step-00000008" / "checkpoint.json").write_text("damaged")
    later = (folders / "step-00000008" / "checkpoint.json").stat().st_mtime_ns + 1
    os.utime(folders / "step-00000004" / "checkpoint.json", ns=(later, later))  # by resuming
    write(tmp_path, 6)
    assert sorted(path.name for path in folders.glob("step*")) == ["step-00000004", "step-00000006"]


def test_copies_that_somebody_keeps_stay(tmp_path):
    """`step-00000001-best` was once dropped as the oldest."""
    write(tmp_path, 1)
    root = tmp_path / "checkpoints"
    shutil.copytree(root / "step-00000001", root / "step-00000001-best")
    (root / "step-best").symlink_to("step-00000001-best")
    for step in (2, 3, 4):
        write(tmp_path, step)
    assert sorted(path.name for path in root.iterdir()) == [
        "latest", "step-00000001-best", "step-00000003", "step-00000004", "step-best"
    ]  # fmt: skip
    assert load_checkpoint(root / "step-00000001-best").step == 1


def test_an_old_checkpoint_that_cannot_go_costs_no_save(tmp_path, monkeypatch):
    """A file that somebody has open on NFS keeps its folder."""
    for step in (1, 2):
        write(tmp_path, step)
    rmdir, refused = os.rmdir, []

    def refuse(path, **options):
        if not refused:
            refused.append(path)
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        rmdir(path, **options)

    monkeypatch.setattr(os, "rmdir", refuse)
    write(tmp_path, 3)
    assert refused and load_checkpoint(tmp_path).step == 3
    write(tmp_path, 4)  # and goes with the next
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders == ["latest", "step-00000003", "step-00000004"]


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("step", "x"), ("step", None), ("step", 12.5), ("step", -1), ("files", 5), ("files", {}),
        ("config", []), ("data", None), ("data", {"images": "x"}), ("data", {"images": 0}),
        ("seconds", float("nan")), ("seconds", "x"), ("state", 5), ("state", {}),
        ("state", {"tensor": "nope"}), ("state", {"dict": 5}),
        ("state", {"dict": [[[1], {"value": 1}]]}),
    ],
)  # fmt: skip
def test_entries_of_another_kind_are_refused_whoever_wrote_them(tmp_path, entry, value):
    """With a checksum that fits; some ended in a traceback, and seconds of NaN in no report."""
    write(tmp_path)
    file = tmp_path / "checkpoints" / "step-00000005" / "checkpoint.json"
    metadata = json.loads(file.read_text()) | {entry: value}
    metadata["checksum"] = module._checksum(metadata)
    file.write_text(json.dumps(metadata))
    with pytest.raises(CheckpointError, match=rf"checkpoint\.json is damaged: .*{entry}"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../../other/checkpoints/step-00000005", "{other}/step-00000005", "..", "", "step-5/.."],
)
def test_latest_leads_nowhere_else(tmp_path, name):
    write(tmp_path / "run")
    write(tmp_path / "other")
    latest = tmp_path / "run" / "checkpoints" / "latest"
    latest.write_text(name.format(other=tmp_path / "other" / "checkpoints"))
    with pytest.raises(CheckpointError, match="must name a checkpoint beside it, as step-00000500"):
        load_checkpoint(tmp_path / "run")


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    write(tmp_path, 1)
    monkeypatch.setattr("ijepa.disk.free_bytes", lambda folder: 12_345)
    before = sorted((tmp_path / "checkpoints").rglob("*"))
    with pytest.raises(NotWritten, match=rf"step-00000002 needs .* kB in {tmp_path}/checkpoints, "
                       "which has 12.3 kB free: make room for"):  # fmt: skip
        write(tmp_path, 2)
    assert sorted((tmp_path / "checkpoints").rglob("*")) == before


def test_the_same_step_may_be_written_again(tmp_path):
    write(tmp_path, 3)
    weights, _ = write(tmp_path, 3)
    assert_same(load_checkpoint(tmp_path).weights["a.b"], weights["a.b"].contiguous())
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_found(tmp_path, name):
    write(tmp_path)
    file = tmp_path / "checkpoints" / "step-00000005" / name
    content = bytearray(file.read_bytes())
    # the last quarter: tensor data, or the JSON description of the optimiser's state
    content[-len(content) // 4] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_missing_file_is_found(tmp_path, name):
    write(tmp_path)
    file = tmp_path / "checkpoints" / "step-00000005" / name
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        load_checkpoint(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(tmp_path)


def test_foreign_folders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoints"):
        load_checkpoint(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        load_checkpoint(tmp_path)
    write(tmp_path)
    file = tmp_path / "checkpoints" / "step-00000005" / "checkpoint.json"
    written = json.loads(file.read_text())
    for change, expected in (
        ({"format": "other"}, "foreign"),
        ({"format_version": 99}, "format version 99, this program reads 1"),
        ({"step": 6}, "damaged"),
    ):
        file.write_text(json.dumps({**written, **change}))
        with pytest.raises(CheckpointError, match=expected):
            load_checkpoint(tmp_path)
    file.write_text("[1]")
    with pytest.raises(CheckpointError, match="foreign"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("failing", ["save_file", "write_whole", "sync"])
def test_a_write_that_is_cut_off_leaves_the_last_one(tmp_path, monkeypatch, failing):
    weights, _ = write(tmp_path, 1)

    def fail(*_arguments):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(module, failing, fail)
        with pytest.raises(NotWritten, match=r"step-00000002 could not .*disk full"):
            write(tmp_path, 2)
    assert not list((tmp_path / "checkpoints").rglob("*00002*"))
    loaded = load_checkpoint(tmp_path)
    assert loaded.step == 1
    assert_same(loaded.weights["predictor.mask_token"], weights["predictor.mask_token"])
    write(tmp_path, 3)  # and what it left behind is in nobody's way
    assert load_checkpoint(tmp_path).step == 3
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_what_cannot_be_stored_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"/a/0: set"):
        save_checkpoint(tmp_path, 1, {}, {"a": [{1, 2}]}, {})
