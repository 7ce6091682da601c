"""The results file of the whole-step benches."""

from __future__ import annotations

import json

import torch

from bench.timing import RESULTS, commit


def save_step(device: str, entry: dict) -> None:
    """Put a table among the step results of this device, in the place of an older one like it."""
    path = RESULTS / f"step-{device.replace(' ', '-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else []
    names = ("size", "precision", "batching")
    results = [old for old in results if any(old[n] != entry[n] for n in names)]
    results.append({"device": device, "torch": torch.__version__, "commit": commit(), **entry})
    path.write_text(json.dumps(results, indent=2) + "\n")
