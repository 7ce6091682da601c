"""Tar files of images: any of them at once, the same as the folder, whatever else is in them."""

from __future__ import annotations

import io
import os
import tarfile

import numpy as np
import pytest
from PIL import Image
from small_runs import photographs

from ijepa.cli import main
from ijepa.data import CenterCrop, ImageError, images_at, load_batch
from ijepa.data.shards import tar_index as index_module
from ijepa.data.shards.source import ShardSource
from ijepa.data.shards.tar_index import tar_index
from ijepa.data.shards.write import write_shards


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IJEPA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "indexes"


def jpeg(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((20, 30, 3), value, dtype=np.uint8)).save(file, "jpeg")
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(data))


def test_shards_hold_what_the_folder_holds(tmp_path):
    photographs(tmp_path / "photos", 40, classes=3)
    source = images_at(tmp_path / "photos")
    written = write_shards(source, tmp_path / "shards", shard_bytes=30_000, seed=1)
    assert written.images == 40 and len(written.archives) > 2
    assert all((tmp_path / "shards" / n).stat().st_size <= 30_000 for n in written.archives)
    shards = images_at(tmp_path / "shards")
    assert isinstance(shards, ShardSource) and len(shards) == 40
    assert shards.class_names == source.class_names
    view = CenterCrop((16, 16))
    numbers = np.random.default_rng(0).permutation(40)  # across archives, in any order
    mine = load_batch(shards, numbers, view)
    theirs = load_batch(source, np.arange(40), view)
    assert not mine.unreadable
    kinds = {
        (theirs.images[i].numpy().tobytes(), int(source.labels["class"][i])) for i in range(40)
    }
    found = {
        (mine.images[k].numpy().tobytes(), int(shards.labels["class"][n]))
        for k, n in enumerate(numbers)
    }
    assert found == kinds and len(kinds) == 40
    again = write_shards(source, tmp_path / "again", shard_bytes=30_000, seed=1)
    for name in again.archives:  # byte by byte a function of the images and the seed
        first, second = tmp_path / "shards" / name, tmp_path / "again" / name
        assert first.read_bytes() == second.read_bytes()


def test_archives_of_others(tmp_path):
    """pax headers, long names, folders, other files, labels of some samples alone."""
    path = tmp_path / "train.tar"
    long_name = "a/" * 80 + "é" * 40 + ".JPEG"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "a", type=tarfile.DIRTYPE)
        add(tar, long_name, jpeg(10))
        add(tar, "b.jpg", jpeg(20))
        add(tar, "b.json", b"{}")
        add(tar, "b.cls", b"7\n")
    source = images_at(path)
    assert [source.name(n) for n in range(2)] == [str(path / long_name), str(path / "b.jpg")]
    assert source.labels == {}  # one of two has none
    values = [source.open(n).decode().mean() for n in (1, 0)]
    assert values == pytest.approx([20, 10], abs=1)


def test_what_is_no_image_is_left_out_and_leads_nowhere(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(jpeg(99))
    path = tmp_path / "in" / "hostile.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        add(tar, "../secret.jpg", jpeg(1))  # a name like any other: nothing is unpacked
        add(tar, "/etc/passwd.jpg", jpeg(2))
        add(tar, "link.jpg", type=tarfile.SYMTYPE, linkname="../secret.jpg")
        add(tar, "hard.jpg", type=tarfile.LNKTYPE, linkname="../secret.jpg")
        add(tar, "loop.jpg", type=tarfile.SYMTYPE, linkname="loop.jpg")
        add(tar, "fifo.jpg", type=tarfile.FIFOTYPE)
        add(tar, "null.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=3)
        add(tar, "esc\x1b[2J.jpg", type=tarfile.FIFOTYPE)
    source = images_at(path)
    assert [source.open(n).decode().mean() for n in range(2)] == pytest.approx([1, 2], abs=1)
    assert len(source) == 2 and len(source.left_out) == 6
    assert "\x1b" not in "".join(source.left_out)
    assert sum("a link" in line for line in source.left_out) == 3
    assert {p.name for p in tmp_path.iterdir()} == {"secret.jpg", "in", "cache"}


@pytest.mark.parametrize(
    ("blocks", "left"), [(0.5, 0), (1.5, 0), (3, 1), (3.2, 1), (4, 1), (4.1, 1), (5.9, 1), (6, 2)]
)
def test_a_damaged_archive_loses_what_is_behind_the_damage(tmp_path, blocks, left):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for number in range(3):
            add(tar, f"{number}.jpg", jpeg(number).ljust(1024, b"\0"))  # three blocks each
    path = tmp_path / "cut.tar"
    path.write_bytes(whole.getvalue()[: int(blocks * 512)])
    index = tar_index(path, None)
    assert len(index.names) == left
    assert len(index.left_out) == 1 and str(path) in index.left_out[0]
    if not index.names:
        with pytest.raises(ValueError, match="no images in the 1 tar files"):
            images_at(path)


def test_a_header_of_rubbish_is_named_with_its_place(tmp_path):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for number in range(3):
            add(tar, f"{number}.jpg", jpeg(number))
    content = bytearray(data.getvalue())
    second = content.index(b"1.jpg\0")
    content[second + 124 : second + 136] = b"7" * 12  # its size
    path = tmp_path / "broken.tar"
    path.write_bytes(content)
    index = tar_index(path, None)
    assert index.names == ["0.jpg"]
    assert f"damaged at byte {second:,}" in index.left_out[0]


def test_an_index_is_kept_until_the_archive_changes(tmp_path, cache, monkeypatch):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "0.jpg", jpeg(5))
        add(tar, "0.cls", b"3")
    first = tar_index(path, cache)
    with monkeypatch.context() as patched:
        patched.setattr(index_module, "_scan", lambda archive: pytest.fail("scanned again"))
        kept = tar_index(path, cache)
    assert kept.names == first.names and kept.labels.tolist() == [3]
    source = ShardSource(tmp_path, ["a.tar"], cache=cache)
    with tarfile.open(path, "a") as tar:
        add(tar, "1.jpg", jpeg(6))
    with pytest.raises(ImageError, match="changed since its index was made"):
        source.open(0)
    assert tar_index(path, cache).names == ["0.jpg", "1.jpg"]
    for damaged in (b"", b"PK\3\4rubbish", os.urandom(300)):  # is made again
        next(cache.iterdir()).write_bytes(damaged)
        assert len(tar_index(path, cache).names) == 2


def test_few_archives_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("ijepa.data.shards.source._OPEN_ARCHIVES", 2)
    names = [f"{number}.tar" for number in range(5)]
    for number, name in enumerate(names):
        with tarfile.open(tmp_path / name, "w") as tar:
            add(tar, "x.jpg", jpeg(40 * number))
    source = images_at(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for number in (4, 0, 2, 2, 1, 3, 0):
        assert source.open(number).decode().mean() == pytest.approx(40 * number, abs=1)
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_the_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path / "photos", 12, classes=2)
    (tmp_path / "photos" / "class-0" / "bad.jpg").write_bytes(b"no image")
    os.mkfifo(tmp_path / "photos" / "class-1" / "fifo.jpg")
    assert main(["data", "shard", "photos", "shards"]) == 1
    out = capsys.readouterr().out
    assert "12 images in 1 tar files" in out and "bad.jpg: not an image" in out
    assert "fifo.jpg: FIFO" in out
    assert main(["data", "check", "shards"]) == 0
    out = capsys.readouterr().out
    assert "24 x 20" in out and "2, of 6 to 6 images" in out
    with Image.open("contact-sheet.png") as sheet:
        assert sheet.size == (8 * 96, 2 * 96)
    assert main(["data", "check", "photos"]) == 1
    assert "bad.jpg" in capsys.readouterr().out
    assert main(["data", "shard", "photos", "shards"]) == 1
    assert "shards is not empty" in capsys.readouterr().err
    assert main(["data", "frobnicate"]) == 1
