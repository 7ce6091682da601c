"""The log of a run, line by line and as events."""

import errno
import json
import os

import pytest

from ijepa.disk import NotWritten
from ijepa.report.metrics import MetricsWriter, read_metrics


def test_metrics_go_on_after_the_checkpoint(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(1, 7):
        writer.write(step, {"loss": step / 10, "knn": None})
    writer.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 7, "lo')  # killed in the middle of a line
    writer = MetricsWriter(tmp_path, first_step=4)
    writer.write(5, {"loss": 0.5})
    writer.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[0] == {"step": 1, "loss": 0.1}


def test_lines_wait_where_the_disk_is_full(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": 0.5})
    file, full = os.dup(writer._file), os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._file)
    for step in (2, 3):
        writer.write(step, {"loss": 0.5})
    assert "metrics.jsonl could not be written" in str(writer.failure)
    with pytest.raises(NotWritten, match="No space left on device"):
        writer.sync()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    os.dup2(file, writer._file)
    writer.write(4, {"loss": 0.5})
    writer.sync()
    assert writer.failure is None
    writer.close()
    writer.close()  # twice is once
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_run_from_the_start_begins_its_log_anew(tmp_path):
    for _ in range(2):
        writer = MetricsWriter(tmp_path)
        writer.write(0, {"cosine": 0.5})
        writer.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [0]


def test_tensorboard_whose_disk_is_full_does_not_end_the_run(tmp_path):
    pytest.importorskip("tensorboard")
    writer = MetricsWriter(tmp_path, tensorboard=True)

    def fail(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer._events.add_scalar = fail
    for step in (1, 2):
        writer.write(step, {"loss": 0.5})
    writer.close()
    assert "TensorBoard's files could not be written" in str(writer.events_failure)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_tensorboard_gets_the_same_figures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, tensorboard=True)
    writer.write(3, {"loss": 0.5})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.5)]


def test_tensorboard_that_is_missing_is_explained(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ijepa\[tensorboard\]'"):
        MetricsWriter(tmp_path, tensorboard=True)
