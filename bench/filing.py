"""The results files: one for each device and kind of bench, a new table in an older one's place.

BENCH_RESULTS names another folder for them.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from ijepa.disk import write_whole

RESULTS = Path(os.environ.get("BENCH_RESULTS", Path(__file__).parent / "results"))


def device_name(device: str) -> str:
    """The name that results are filed under."""
    return torch.cuda.get_device_name() if device == "cuda" else _cpu_name()


def _cpu_name() -> str:
    """Model and generation of the processor, its architecture where the system does not tell."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        return platform.machine() + " cpu"
    facts = {name.strip(): value.strip() for name, _, value in lines}
    if "model name" not in facts:
        return platform.machine() + " cpu"
    return f"{facts['model name']} family {facts['cpu family']} model {facts['model']}"


def commit() -> str:
    """What is measured; BENCH_COMMIT names it where the folder is no repository."""
    if "BENCH_COMMIT" in os.environ:
        return os.environ["BENCH_COMMIT"]
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except FileNotFoundError:  # no git
        return "unknown"
    return found.stdout.strip() or "unknown"


def save_table(title: str, device: str, rows: dict[str, dict], **facts: object) -> None:
    """Put a table among the kernel results of this device, in the place of an older one."""
    path = _path("kernels", device_name(device))
    results = json.loads(path.read_text()) if path.exists() else {}
    results[title] = {
        "device": device_name(device),
        "on_gpu": device == "cuda",
        "torch": torch.__version__,
        "commit": commit(),
        **facts,
        "providers": rows,
    }
    write_json(path, results)


def save_step(device: str, entry: dict) -> None:
    """Put a table among the step results of this device, in the place of an older one like it.

    Args:
        device: its name.
        entry: "size", "precision" and "batching" say which table it is.
    """
    path = _path("step", device)
    results = json.loads(path.read_text()) if path.exists() else []
    names = ("size", "precision", "batching")
    results = [old for old in results if any(old[n] != entry[n] for n in names)]
    results.append({"device": device, "torch": torch.__version__, "commit": commit(), **entry})
    write_json(path, results)


def write_json(path: Path, results: Any) -> None:
    """Replace a results file, folders made where they lack; a run that is cut off spoils none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(results, indent=2) + "\n")


def _path(kind: str, device: str) -> Path:
    return RESULTS / f"{kind}-{device.replace(' ', '-')}.json"
