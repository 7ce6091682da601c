"""Files that are whole or not there, and what is said where there is no room."""

import errno

import pytest

from ijepa import disk
from ijepa.disk import NotWritten, readable_bytes, require_space, write_whole, written_aside


def test_a_file_is_replaced_whole(tmp_path):
    write_whole(tmp_path / "a.txt", "one")
    write_whole(tmp_path / "a.txt", "zwei ü")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "zwei ü"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_whole(tmp_path / "a.txt", "one")

    def fail(_path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "sync", fail)
    with pytest.raises(NotWritten, match=rf"a.txt could not be written into {tmp_path}: No space "
                       r"left on device; [\d.]+ .B are free there"):  # fmt: skip
        write_whole(tmp_path / "a.txt", "two")
    assert (tmp_path / "a.txt").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_other_errors_leave_nothing_either(tmp_path):
    with pytest.raises(ZeroDivisionError), written_aside(tmp_path / "a.png") as aside:
        aside.write_bytes(b"half")
        raise ZeroDivisionError
    assert aside.suffix == ".png" and not list(tmp_path.iterdir())


def test_a_folder_that_is_gone_is_named(tmp_path):
    with pytest.raises(NotWritten, match=rf"{tmp_path}/gone: No such file"):
        write_whole(tmp_path / "gone" / "a.txt", "")


def test_room_is_asked_for_first(tmp_path, monkeypatch):
    require_space("it", tmp_path, 1)
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 1000)
    require_space("it", tmp_path, 1000)
    with pytest.raises(NotWritten, match=r"it needs 2.5 kB in .*1.0 kB free: make room for 1.5 kB"):
        require_space("it", tmp_path, 2500)
    monkeypatch.setattr(disk, "free_bytes", lambda folder: None)  # unknown
    require_space("it", tmp_path, 2500)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (999_949, "999.9 kB"),
     (999_950, "1.0 MB"), (1_234_567_890, "1.2 GB"), (5 * 10**15, "5000.0 TB")],
)  # fmt: skip
def test_sizes_are_readable(count, text):
    assert readable_bytes(count) == text
