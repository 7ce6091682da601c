"""What a run shows while it goes on."""

import io
import time

import pytest
from rich.console import Console

from ijepa.report.progress import RunProgress, format_seconds, telling


def test_plain_lines_where_there_is_no_terminal():
    text = io.StringIO()
    with RunProgress(Console(file=text, width=200), 100, 0, batch_size=8) as progress:
        for step in range(1, 101):
            progress.update(step, loss=1 / step, lr=1e-3)
        progress.note("a [bracket] stays")
    lines = text.getvalue().splitlines()
    assert len(lines) == 3  # the first, the last, the note; none in between within 20 s
    assert lines[0].startswith("step 1/100  loss 1.0000  lr 1.00e-03")
    assert lines[1].startswith("step 100/100  loss 0.0100") and lines[1].endswith("0:00 left")
    assert lines[2] == "a [bracket] stays"


def test_a_live_line_on_a_terminal():
    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=True, color_system=None)
    with RunProgress(console, 100, 40, batch_size=8) as progress:
        progress.update(41, loss=0.25, lr=5e-4)
    shown = text.getvalue()
    for part in ("step 41", "/100", "loss 0.2500", "lr 5.00e-04", "images/s", "left"):
        assert part in shown


def test_silence_without_a_console():
    with RunProgress(None, 10, 0, batch_size=8) as progress:
        progress.update(1, loss=1.0, lr=1.0)
        progress.note("nobody hears this")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (90, "1:30"), (3700, "1:01:40"), (59.7, "1:00")]
)
def test_times_are_readable(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize("first_is_slow", [False, True])
def test_an_absurd_time_left_is_told_once_with_a_way_out(monkeypatch, first_is_slow):
    now = [0.0]
    monkeypatch.setattr("ijepa.report.progress.time.perf_counter", lambda: now[0])
    text = io.StringIO()
    progress = RunProgress(Console(file=text, width=300), 11_000, 0, 2048,
                           first_is_slow=first_is_slow, smaller="Try less.")  # fmt: skip
    now[0] = 97.0  # of the panel, which says nothing about steps
    progress.begin()
    for step in (1, 2, 3):
        now[0] += 240.0
        progress.update(step, loss=1.0, lr=1e-3)
        assert ("Try less." in text.getvalue()) == (step > first_is_slow)
    assert text.getvalue().count("At this rate 30 days 13 h are left. Try less.") == 1


def test_a_quick_run_is_not_warned_of(monkeypatch):
    text = io.StringIO()
    progress = RunProgress(Console(file=text, width=300), 100, 0, 8, smaller="Try less.")
    progress.begin()
    progress.update(1, loss=1.0, lr=1e-3)
    assert "Try less." not in text.getvalue()


def test_days_are_readable():
    assert format_seconds(682 * 3600 + 8) == "28 days 10 h"
    assert format_seconds(47 * 3600) == "47:00:00"


def test_what_takes_long_is_told_and_what_does_not_is_not(monkeypatch):
    monkeypatch.setattr("ijepa.report.progress.SECONDS_UNTOLD", 0.05)
    text = io.StringIO()
    console = Console(file=text)
    with telling(console, "Nothing"):
        pass
    with telling(console, "Looking for [images]"):
        time.sleep(0.5)
    assert text.getvalue() == "Looking for [images] ...\n"
