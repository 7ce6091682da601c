"""Output that nobody reads, that has no room, or that lacks the characters of a file name."""

import errno
import os
import subprocess
import sys

import pytest
from small_runs import photographs, small_arguments

from ijepa.report.console import RunConsole
from ijepa.train.checkpoint import load_checkpoint


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.setenv("IJEPA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(os.path.abspath, sys.path)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)


def ijepa(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ijepa.cli", *arguments]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(command, timeout=300, **options)


def test_a_log_on_a_full_disk_ends_no_run(tmp_path):
    with open("/dev/full", "wb") as full:
        done = ijepa("pretrain", *small_arguments("run"), stdout=full)
    assert b"output cannot be written (No space left on device)" in done.stderr
    assert b"Traceback" not in done.stderr
    assert load_checkpoint(tmp_path / "run").step == 12
    assert (tmp_path / "run" / "summary.md").exists()


def test_both_streams_on_a_full_disk_end_no_run(tmp_path):
    with open("/dev/full", "wb") as full:
        ijepa("pretrain", *small_arguments("run"), stdout=full, stderr=full)
    assert load_checkpoint(tmp_path / "run").step == 12


def test_lines_are_missing_while_there_is_no_room_and_come_after(monkeypatch, capsys):
    console = RunConsole()
    write, full = sys.stdout.write, [errno.ENOSPC]

    def maybe_full(text):
        if full:
            raise OSError(full[0], os.strerror(full[0]))
        return write(text)

    monkeypatch.setattr(sys.stdout, "write", maybe_full)
    console.print("first")
    console.print("second")
    full.clear()
    console.print("third")
    captured = capsys.readouterr()
    assert captured.out == "third\n"
    assert captured.err.count("output cannot be written (No space left on device)") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["plan", "vitb16"]])
def test_output_that_is_not_read_to_its_end_is_no_error(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    done = ijepa(*arguments, stdout=writer)
    os.close(writer)
    assert done.returncode == 1 and not done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8:strict"])
def test_names_that_no_terminal_can_say(tmp_path, encoding):
    """A folder of two alphabets, and names that are no text in any encoding."""
    photographs(tmp_path / "фото", 12)
    folder = os.fsencode(tmp_path / "фото" / "class-0")
    with open(folder + b"/broken\xff.png", "wb"):
        pass
    os.mkfifo(folder + b"/fifo\xff.png")
    os.mkfifo(folder + b"/\x1b[31mred\n.png")
    settings = {"data__source": "folder", "data__path": "фото", "train__batch_size": 13,
                "monitor__evaluate": True}  # fmt: skip
    arguments = [os.fsencode(argument) for argument in small_arguments("run", **settings)]
    output = arguments.index(b"--train.output") + 1
    arguments[output] = b"run$_$\xff"
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = ijepa("pretrain", *arguments, env=environment)
    assert done.returncode == 0, done.stderr
    for part in (b"13 images in ", rb"broken\udcff.png: empty file", rb"fifo\udcff.png: FIFO",
                 rb"\x1b[31mred\n.png: FIFO", b"raw pixels",
                 rb"Results: run$_$\udcff"):  # fmt: skip
        assert part in done.stdout + done.stderr, part
    (run,) = tmp_path.glob("run*")
    summary = (run / "summary.md").read_text(encoding="utf-8")
    assert rb"broken\udcff.png: empty file".decode() in summary
    assert rb"fifo\udcff.png: FIFO".decode() in summary and "\x1b" not in summary
    assert (run / "curves.png").exists()
