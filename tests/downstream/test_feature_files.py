"""Features on disk: whole at every moment, and gone on with by whoever is entitled to."""

import json

import numpy as np
import pytest

from ijepa.disk import NotWritten
from ijepa.downstream.feature_files import (
    DESCRIPTION,
    FEATURES,
    NAMES,
    FeatureFiles,
    npy_header,
    read_features,
)

IDENTITY = {"encoder": "abc", "size": (4, 4)}
ROWS = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
NAMED = [f"folder/{number} é.png" for number in range(8)] + ["two\nlines.png"]


def write_all(folder, sizes=(2, 3, 4), stop_after=None, commit=True):
    """Append the rows in parts; stop in the middle where asked, without a word."""
    files = FeatureFiles(folder, IDENTITY, 5)
    at = 0
    for number, size in enumerate(sizes):
        if at >= files.rows:
            files.append(ROWS[at : at + size], NAMED[at : at + size], {})
            if number == stop_after:
                if commit:
                    files.commit()
                files._lock.release()
                return  # killed: nothing is closed
            files.commit()
        at += size
    files.append(ROWS[:0], [], {"broken.jpg": "empty file"})
    files.commit(complete=True)
    files.close()


def contents(folder):
    return {name: (folder / name).read_bytes() for name in (FEATURES, NAMES, DESCRIPTION)}


def test_what_is_written_is_read(tmp_path):
    write_all(tmp_path / "a")
    features, names, described = read_features(tmp_path / "a")
    assert np.array_equal(features, ROWS) and isinstance(features, np.memmap)
    assert names == [*NAMED[:8], "two\\nlines.png"]
    assert described["complete"] and described["done"] == 10 and described["rows"] == 9
    assert described["unreadable"] == {"broken.jpg": "empty file"}
    assert described["encoder"] == "abc" and "torch" in described["versions"]
    assert np.array_equal(np.load(tmp_path / "a" / FEATURES), ROWS)


@pytest.mark.parametrize("rows", [0, 7, 10**12])
def test_the_header_is_numpys(rows, tmp_path):
    header = npy_header(rows, 1280)
    assert len(header) == 128
    (tmp_path / "a.npy").write_bytes(header)
    with (tmp_path / "a.npy").open("rb") as file:
        version = np.lib.format.read_magic(file)
        assert version == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        assert (shape, fortran, dtype) == ((rows, 1280), False, np.dtype("<f4"))
        assert file.tell() == 128


@pytest.mark.parametrize("stop_after", [0, 1, 2])
@pytest.mark.parametrize("commit", [True, False])
def test_an_interrupted_writer_is_gone_on_with(stop_after, commit, tmp_path):
    write_all(tmp_path / "whole")
    write_all(tmp_path / "cut", stop_after=stop_after, commit=commit)
    if commit or stop_after:  # readable at once, with the rows that were committed
        features, _, described = read_features(tmp_path / "cut")
        assert len(features) == [2, 5, 9][stop_after if commit else stop_after - 1]
        assert not described["complete"]
    write_all(tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_rows_that_nothing_counts_are_cut_off(tmp_path):
    write_all(tmp_path / "whole")
    write_all(tmp_path / "cut", stop_after=0)
    with (tmp_path / "cut" / FEATURES).open("ab") as file:
        file.write(b"\x01" * 37)
    with (tmp_path / "cut" / NAMES).open("ab") as file:
        file.write(b"half a na")
    with (tmp_path / "cut" / FEATURES).open("r+b") as file:
        file.write(npy_header(4_000, 5))  # the header was ahead of the commit record, or torn
    write_all(tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_others_features_are_not_gone_on_with(tmp_path):
    write_all(tmp_path / "a")
    with pytest.raises(ValueError, match=r"a holds other features: encoder is 'abc' there and 'x'"):
        FeatureFiles(tmp_path / "a", {**IDENTITY, "encoder": "x"}, 5)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / FEATURES).write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"holds features\.npy or names\.txt without embed\.json"):
        FeatureFiles(tmp_path / "b", IDENTITY, 5)
    assert (tmp_path / "b" / FEATURES).read_bytes() == b"mine"


def test_damage_is_named(tmp_path):
    for name, message in ((FEATURES, "features.npy is damaged"), (NAMES, "names.txt is damaged")):
        folder = tmp_path / name
        write_all(folder)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-3])
        with pytest.raises(ValueError, match=message):
            FeatureFiles(folder, IDENTITY, 5)
    for text, message in (("{", "is damaged"), (json.dumps({"a": 1}), "was not written by")):
        (tmp_path / "c").mkdir(exist_ok=True)
        (tmp_path / "c" / DESCRIPTION).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_features(tmp_path / "c")
    with pytest.raises(ValueError, match=r"holds no embed\.json: give a folder that"):
        read_features(tmp_path / "none")


def test_a_full_disk_loses_nothing_that_was_committed(tmp_path, monkeypatch):
    files = FeatureFiles(tmp_path / "a", IDENTITY, 5)
    files.append(ROWS[:2], NAMED[:2], {})
    files.commit()
    files.append(ROWS[2:4], NAMED[2:4], {})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ijepa.downstream.feature_files.os.fsync", full)
    with pytest.raises(NotWritten, match=r"features\.npy could not be written into .* No space"):
        files.commit()
    monkeypatch.undo()
    files.close()
    write_all(tmp_path / "a")
    write_all(tmp_path / "whole")
    assert contents(tmp_path / "a") == contents(tmp_path / "whole")


def test_rows_of_another_kind_are_refused(tmp_path):
    files = FeatureFiles(tmp_path / "a", IDENTITY, 5)
    with pytest.raises(ValueError, match=r"must be float32 of shape \(2, 5\), got float64"):
        files.append(ROWS[:2].astype(np.float64), NAMED[:2], {})
    with pytest.raises(ValueError, match=r"shape \(2, 5\), got float32 \(3, 5\)"):
        files.append(ROWS[:3], NAMED[:2], {})
    files.close()
