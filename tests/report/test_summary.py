"""The report of a run."""

import importlib.util

import numpy as np
from rich.console import Console
from small_runs import small_recipe

from ijepa.report.summary import PLOTS_NOTE, RunReport, show_files, write_report


def test_without_matplotlib_the_report_says_so(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name == "matplotlib" else found(name, *rest),
    )
    recipe = small_recipe(tmp_path).in_steps(32)
    console = Console(record=True, width=120)
    report = RunReport(folder=tmp_path, recipe=recipe, images=32, seconds=2.0)
    write_report(report, np.zeros((8, 8, 3), dtype=np.uint8))
    show_files(report, console)
    assert PLOTS_NOTE in console.export_text()
    assert not (tmp_path / "curves.png").exists() and (tmp_path / "masks.png").exists()
    assert PLOTS_NOTE in (tmp_path / "summary.md").read_text()
