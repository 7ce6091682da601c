"""Folders of images: what is found, how it is labelled, what happens to damaged files."""

import errno
import logging
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image

from ijepa.data import (
    CenterCrop,
    ImageError,
    RandomResizedCrop,
    Squash,
    build_loader,
    build_source,
    folder_source,
    load_batch,
)
from ijepa.data.batch import batch_labels

PHOTOS = Path(sklearn.datasets.__file__).parent / "images"


def save(path: Path, colour: tuple[int, int, int], size=(20, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two real photographs and six flat images, unlabelled."""
    for name in ("china.jpg", "flower.jpg"):
        shutil.copy(PHOTOS / name, tmp_path / name)
    for number in range(6):
        save(tmp_path / f"flat{number}.png", (40 * number, 0, 0))
    return tmp_path


def test_flat_folder_has_no_labels(photos):
    source = build_source("folder", path=photos)
    assert len(source) == 8 and source.labels == {}
    assert [Path(source.name(i)).name for i in (0, 7)] == ["china.jpg", "flower.jpg"]
    batch = load_batch(source, np.arange(8), CenterCrop((24, 32)))
    images = batch.images
    assert images.shape == (8, 3, 24, 32) and images.dtype == torch.uint8
    assert batch_labels(source, batch) == {}
    assert images[3].unique().tolist() == [0, 80]


def test_nested_folder_is_labelled_by_first_level(tmp_path):
    save(tmp_path / "dog" / "deep" / "b.PNG", (1, 2, 3))
    save(tmp_path / "cat" / "a.webp", (1, 2, 3))
    save(tmp_path / "cat" / "z.bmp", (1, 2, 3))
    save(tmp_path / "dog" / ".hidden.png", (1, 2, 3))
    save(tmp_path / ".cache" / "c.png", (1, 2, 3))
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    source = folder_source(tmp_path)
    assert source.labels["class"].tolist() == [0, 0, 1]
    assert source.class_names == {"class": ("cat", "dog")}
    assert source.name(2).endswith("dog/deep/b.PNG")


def test_mixed_or_single_folders_give_no_labels(tmp_path):
    save(tmp_path / "only" / "a.png", (0, 0, 0))
    assert folder_source(tmp_path).labels == {}
    save(tmp_path / "other" / "a.png", (0, 0, 0))
    assert set(folder_source(tmp_path).labels) == {"class"}
    save(tmp_path / "top.png", (0, 0, 0))
    assert folder_source(tmp_path).labels == {}


def test_links_are_followed_once(tmp_path):
    save(tmp_path / "real" / "a.png", (0, 0, 0))
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "real")
    assert len(folder_source(tmp_path / "data")) == 1


def test_odd_file_names(tmp_path):
    save(tmp_path / "grüße \udcff.png", (9, 9, 9))
    source = folder_source(tmp_path)
    assert source.open(0).decode().max() == 9


def test_errors_say_what_to_try(tmp_path):
    with pytest.raises(ValueError, match="holds no files"):
        folder_source(tmp_path)
    (tmp_path / "images.tar").write_text("")
    with pytest.raises(ValueError, match=r"only other files \(1 .tar\): unpack archives"):
        folder_source(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        folder_source(tmp_path / "images.tar")
    with pytest.raises(ValueError, match=f"nearest one that exists is {tmp_path}"):
        folder_source(tmp_path / "missing" / "folder")
    with pytest.raises(ValueError, match="choose folder, shapes, scenes"):
        build_source("imagenet")
    with pytest.raises(ValueError, match="needs the path"):
        build_source("folder")


def test_unreadable_images_are_replaced_counted_and_named(photos, caplog):
    whole = (photos / "china.jpg").read_bytes()
    (photos / "broken0.jpg").write_bytes(whole[: len(whole) // 3])
    (photos / "broken1.png").write_bytes(b"")
    source = folder_source(photos)
    assert len(source) == 10
    transform = Squash((8, 8))
    batch = load_batch(source, np.arange(10), transform)
    assert set(batch.unreadable) == {0, 1}
    assert batch.indices[2:].tolist() == list(range(2, 10))
    for row in (0, 1):
        other = batch.indices[row]
        assert other >= 2 and torch.equal(batch.images[row], batch.images[other])
    # The same replacement when asked alone.
    alone = load_batch(source, np.array([1]), transform)
    assert alone.indices[0] == batch.indices[1]

    for workers in (0, 2):
        loader = build_loader(
            source,
            lambda keys: None,
            transform,
            batch_size=5,
            seed=0,
            end_step=4,
            num_workers=workers,
        )
        with caplog.at_level(logging.WARNING):
            assert len(list(loader)) == 4
        assert loader.unreadable.count == 2
        assert sorted(name.split("/")[-1].split(":")[0] for name in loader.unreadable.names) == [
            "broken0.jpg",
            "broken1.png",
        ]
    assert "broken1.png: empty file" in caplog.text


def test_replacement_carries_its_own_label(tmp_path):
    for number in range(8):
        save(tmp_path / f"class{number}" / "a.png", (30 * number, 0, 0))
    (tmp_path / "class3" / "a.png").write_bytes(b"damaged")
    source = folder_source(tmp_path)
    batch = load_batch(source, np.arange(8), Squash((4, 4)))
    labels = batch_labels(source, batch)
    assert batch.images[:, 0, 0, 0].tolist() == (30 * labels["class"]).tolist()


def test_a_damaged_data_set_is_an_error(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="most of this data set is damaged"):
        load_batch(folder_source(tmp_path), np.arange(4), Squash((4, 4)))


@pytest.mark.parametrize("size", [(40, 24), (224, 224)])
def test_pixel_cache_changes_nothing(photos, size):
    """Reduced and full decodes of one image must not be mixed up."""
    transform = RandomResizedCrop(size)
    cached, plain = folder_source(photos), folder_source(photos, cache_bytes=0)
    for epoch in range(4):
        keys = np.arange(8, dtype=np.uint64) + np.uint64(100 * epoch)
        first = load_batch(cached, np.arange(8), transform, keys).images
        assert torch.equal(first, load_batch(plain, np.arange(8), transform, keys).images)
    assert cached._cache.sizes and not plain._cache.sizes


def test_gray_channels(photos):
    source = folder_source(photos, channels=1)
    assert load_batch(source, np.arange(3), Squash((6, 5))).images.shape == (3, 1, 6, 5)
    with pytest.raises(ValueError, match="channels must be 1 or 3"):
        folder_source(photos, channels=4)


@pytest.mark.timeout(30)
def test_what_is_no_file_is_never_opened(photos, monkeypatch):
    """A FIFO named like an image once held the loader for ever."""
    monkeypatch.chdir(photos)  # a socket's path must be short
    os.mkfifo(photos / "pipe.jpg")
    (photos / "null.png").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.png")
        source = folder_source(photos)
    assert len(source) == 8
    assert source.left_out == (
        f"{photos}/null.png: character device",
        f"{photos}/pipe.jpg: FIFO",
        f"{photos}/socket.png: socket",
    )
    os.remove(photos / "flower.jpg")  # and one that takes a file's place later
    os.mkfifo(photos / "flower.jpg")
    with pytest.raises(ImageError, match=r"^FIFO, not a file$"):
        source.open(7)


def test_what_cannot_be_looked_at_is_named(photos, monkeypatch):
    """A link to itself once ended the run, and a folder without permission was passed over."""
    (photos / "self.jpg").symlink_to("self.jpg")
    (photos / "locked").mkdir()
    scandir = os.scandir

    def refuse(path):  # root, whom tests may run as, may look into everything
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    source = folder_source(photos)
    assert source.left_out == (f"{photos}/locked: Permission denied",)
    names = [source.name(index).rpartition("/")[2] for index in range(len(source))]
    with pytest.raises(ImageError, match="Too many levels of symbolic links"):
        source.open(names.index("self.jpg"))
    with pytest.raises(ValueError, match=r"not all of it can be read: .*locked: Permission denied"):
        folder_source(photos / "locked")


def test_a_file_too_large_for_memory_is_not_read(photos, monkeypatch):
    """A hole of three gigabytes was once read into memory."""
    with (photos / "hole.jpg").open("wb") as file:
        file.write(b"\xff\xd8\xff")
        file.truncate(3 << 30)
    source = folder_source(photos)
    names = [source.name(index).rpartition("/")[2] for index in range(len(source))]
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(ImageError, match="3,221,225,472 bytes, more than the limit of 536,870,912"):
        source.open(names.index("hole.jpg"))


def test_a_folder_of_nothing_but_fifos_says_so(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"no images in .*only other files \(1 FIFO\)"):
        folder_source(tmp_path)
