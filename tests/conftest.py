"""Interpreter tests run in a process of their own, beside the others.

Triton decides at import whether kernels are interpreted, and the interpreter and the compiler
cannot share a process. A test marked `interpreter` is therefore collected as usual, executed by
one child pytest with TRITON_INTERPRET=1 that starts with the session, and reports the child's
outcome:

    @pytest.mark.interpreter
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])   # bfloat16 is garbage there
    def test_forward(dtype): ...

Inside, call the op's launch functions on CPU tensors. `TRITON_INTERPRET=1 pytest -m interpreter`
runs them directly, for a debugger.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_REPORT_VARIABLE = "INTERPRETER_TEST_REPORT"
_child_key = pytest.StashKey["_Child"]()


class _Child:
    """The child pytest and, once it has ended, the outcome of each of its tests."""

    def __init__(self, config: pytest.Config, node_ids: list[str]):
        self.directory = tempfile.TemporaryDirectory(prefix="interpreter_tests_")
        folder = Path(self.directory.name)
        self.report, self.log = folder / "report.jsonl", folder / "log.txt"
        (folder / "arguments.txt").write_text("\n".join(node_ids))
        environment = os.environ | {
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            _REPORT_VARIABLE: str(self.report),
        }
        with self.log.open("wb") as log:
            command = f"-m pytest -q -p no:cacheprovider -m interpreter @{folder}/arguments.txt"
            self.process = subprocess.Popen(
                [sys.executable, *command.split()],
                cwd=config.rootpath,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.outcomes: dict[str, dict] | None = None

    def outcome(self, node_id: str) -> dict:
        if self.outcomes is None:
            self.process.wait()
            lines = self.report.read_text().splitlines() if self.report.exists() else []
            self.outcomes = {entry["node_id"]: entry for entry in map(json.loads, lines)}
        missing = {"outcome": "failed", "text": self.log.read_text()[-4000:]}
        return self.outcomes.get(node_id, missing)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.directory.cleanup()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In the child only interpreter tests stay; in the parent they go last."""
    if INTERPRETED:
        others = [item for item in items if not item.get_closest_marker("interpreter")]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item.get_closest_marker("interpreter")]
        # Mutations register mutated ops in this process: nothing may run after them.
        items.sort(key=lambda item: item.path.name == "test_mutations.py")
        return
    for item in items:
        if item.get_closest_marker("interpreter"):
            item.add_marker(pytest.mark.timeout(0))  # the first one waits for the whole child
    items.sort(key=lambda item: item.get_closest_marker("interpreter") is not None)


def pytest_collection_finish(session: pytest.Session) -> None:
    ids = [item.nodeid for item in session.items if item.get_closest_marker("interpreter")]
    if ids and not INTERPRETED and not session.config.option.collectonly:
        session.config.stash[_child_key] = _Child(session.config, ids)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if INTERPRETED or not pyfuncitem.get_closest_marker("interpreter"):
        return None
    outcome = pyfuncitem.config.stash[_child_key].outcome(pyfuncitem.nodeid)
    if outcome["outcome"] == "skipped":
        pytest.skip(outcome["text"])
    if outcome["outcome"] != "passed":
        pytest.fail(outcome["text"], pytrace=False)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the child: write down each test's outcome for the parent; on a GPU machine: for whoever
    reads what an interrupted run had reached."""
    listed = os.environ.get("TEST_REPORT")
    if listed and (report.when == "call" or report.outcome != "passed"):
        with open(listed, "a") as file:
            file.write(f"{report.outcome} {report.nodeid}\n")
    path = os.environ.get(_REPORT_VARIABLE)
    if path and (report.when == "call" or report.outcome != "passed"):
        entry = {
            "node_id": report.nodeid,
            "outcome": report.outcome,
            "text": report.longreprtext,
        }
        with open(path, "a") as file:
            file.write(json.dumps(entry) + "\n")


def pytest_unconfigure(config: pytest.Config) -> None:
    child = config.stash.get(_child_key, None)
    if child is not None:
        child.close()
