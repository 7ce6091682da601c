"""Files that list images."""

from __future__ import annotations

import os

import pytest
from small_runs import photographs

from ijepa.data import folder as folder_module
from ijepa.data import folder_source, images_at, kept_scan


def test_a_list_says_which_images_in_which_order(tmp_path):
    photographs(tmp_path / "photos", 4, classes=1)
    (tmp_path / "some.txt").write_text(
        f"# mine\n\nphotos/3.png\nphotos/0.png\n{tmp_path}/photos/2.png\n"
    )
    source = images_at(tmp_path / "some.txt")
    assert [os.path.basename(source.name(n)) for n in range(3)] == ["3.png", "0.png", "2.png"]
    assert source.labels == {} and source.open(2).width == 24


@pytest.mark.parametrize(
    ("name", "text", "names", "labels"),
    [
        ("a.csv", "path,label\nx.png,cat\ny.png,ant\nz.png,cat\n", ("ant", "cat"), [1, 0, 1]),
        ("a.csv", '"x,1.png",10\ny.png,9\n', ("9", "10"), [1, 0]),
        ("a.tsv", "x y.png\t0\nz.png\t1\n", ("0", "1"), [0, 1]),
    ],
)
def test_labels(tmp_path, name, text, names, labels):
    (tmp_path / name).write_text(text)
    source = images_at(tmp_path / name)
    assert source.class_names["class"] == names
    assert source.labels["class"].tolist() == labels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no image"),
        ("x.png,1\ny.png\n", "line 2: no label"),
        ("x.png,1,2\n", "line 1: 3 columns"),
    ],
)
def test_bad_lists_are_refused_by_line(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        images_at(tmp_path / "a.csv")


def test_a_large_folder_is_looked_through_once(tmp_path, monkeypatch):
    monkeypatch.setenv("IJEPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(folder_module, "KEPT_FROM", 3)
    monkeypatch.setattr(kept_scan, "_SETTLED", -1e6)
    photographs(tmp_path / "photos", 4, classes=2)
    names = [folder_source(tmp_path / "photos").name(n) for n in range(4)]
    with monkeypatch.context() as patched:
        patched.setattr(folder_module, "_scan", lambda *_: pytest.fail("looked through again"))
        source = folder_source(tmp_path / "photos")
        assert [source.name(n) for n in range(4)] == names
        assert source.class_names["class"] == ("class-0", "class-1")
    (tmp_path / "photos" / "class-1" / "new.png").write_bytes(b"")
    assert len(folder_source(tmp_path / "photos")) == 5
    (kept,) = (tmp_path / "cache" / "indexes").iterdir()
    kept.write_bytes(b"rubbish")
    assert len(folder_source(tmp_path / "photos")) == 5


def test_a_folder_that_has_just_changed_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("IJEPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(folder_module, "KEPT_FROM", 3)
    photographs(tmp_path / "photos", 4, classes=1)
    folder_source(tmp_path / "photos")
    assert not (tmp_path / "cache").exists()
