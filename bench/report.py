"""Turns the results of the step benches and precision runs into `bench/RESULTS.md` and plots.

python -m bench.report                  reads bench/results, writes bench/RESULTS.md

Kernel tables come from the same folder. Nothing is measured here and nothing is filled in: what
has no result has no row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.goals import goal_lines

HERE = Path(__file__).parent
PHASES = ("target", "context", "predictor", "backward", "optimizer", "average")
INTRODUCTION = """\
# Measured results

Written by `bench/report.py` from the files in `bench/results`. Every figure names its machine.

- A step is forward, backward, optimiser and moving average on synthetic images that are already
  on the device. Ratios are the best stock step's median time over the provider's: above 1 is
  faster.
- "truncate" gives every provider the same tokens. "packed" keeps every image's own context, which
  dense providers cannot represent.
- MFU counts our step's matrix products, exact cuts included, against a large matrix product
  measured in the same run; dense providers compute somewhat more than is counted.
- Times are medians of interleaved rounds: under other load, ratios within a table hold, while
  milliseconds and MFU differ from table to table.
- MFU refers to the fastest matrix product that PyTorch can be made to call. Its own float32 product
  leaves AVX-512 unused on AMD's processors, and so does every provider but ours.
"""


def load(results: Path, pattern: str) -> Iterator[tuple[str, Any]]:
    """(file stem, JSON) of every matching file."""
    for path in sorted(results.glob(pattern)):
        yield path.stem, json.loads(path.read_text())


def step_section(entry: dict) -> list[str]:
    """One table of the step bench."""
    threads = f"threads: {entry['threads']}; " if entry["threads"] else ""
    lines = [
        f"### {entry['size']}, batch {entry['batch']}, {entry['precision']}, {entry['batching']}",
        "",
        f"{entry['gigaflops']:.1f} GFLOP a step; matmul {entry['matmul_teraflops']:.3f} TFLOP/s; "
        f"{threads}torch {entry['torch']}, commit {entry['commit']}.",
        "",
        "| provider | ms | images/s | MFU | GiB | over best stock | " + " | ".join(PHASES) + " |",
        "|---" * (6 + len(PHASES)) + "|",
    ]
    for label, row in entry["providers"].items():
        ratio, peak = row["speed_over_best_stock"], row["peak_gib"]
        phases = row.get("phases", {})
        cells = [
            label,
            f"{row['ms']:.1f}",
            f"{row['images_per_second']:.1f}",
            f"{100 * row['mfu']:.0f} %",
            "" if peak is None else f"{peak:.2f}",
            "" if ratio is None else f"{ratio:.2f}x",
            *(f"{phases[phase]:.1f}" if phase in phases else "" for phase in PHASES),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def kernel_section(title: str, rows: dict[str, dict]) -> list[str]:
    """One table of a kernel bench; times over the first provider's, which is ours."""
    if not rows or "us" not in next(iter(rows.values())):
        return []
    first = next(iter(rows.values()))["us"]
    lines = [
        f"### {title}",
        "",
        "| provider | us | over ours | GB/s | of the copy |",
        "|---" * 5 + "|",
    ]
    for label, row in rows.items():
        bandwidth, share = row.get("gigabytes_per_second"), row.get("share_of_copy")
        cells = [
            label + ("" if row.get("same", True) else " (another result)"),
            f"{row['us']:.1f}",
            f"{row['us'] / first:.2f}x",
            "" if bandwidth is None else f"{bandwidth:.1f}",
            "" if share is None else f"{share:.0%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def precision_section(stem: str, result: dict, out: Path) -> list[str]:
    """The runs' last losses and, where matplotlib is there, their curves over each other."""
    losses = {label: np.array(curve) for label, curve in result["losses"].items()}
    steps = len(next(iter(losses.values())))
    last = min(50, steps)
    lines = [
        f"### Precision, {steps} steps on {result['device']}",
        "",
        f"| run | mean loss, last {last} steps | largest distance from fp32, means of 25 steps |",
        "|---|---|---|",
    ]
    reference = smoothed(losses["fp32"])
    for label, curve in losses.items():
        distance = np.abs(smoothed(curve) - reference).max()
        lines.append(f"| {label} | {curve[-last:].mean():.5f} | {distance:.5f} |")
    picture = plot_curves(losses, out.parent / f"{stem}.png")
    return [*lines, "", *([f"![loss curves]({picture.name})", ""] if picture else [])]


def smoothed(curve: np.ndarray) -> np.ndarray:
    """Means of 25 steps, or of all where there are fewer."""
    width = min(25, len(curve))
    return np.convolve(curve, np.full(width, 1 / width), mode="valid")


def plot_curves(losses: dict[str, np.ndarray], path: Path) -> Path | None:
    """A PNG of the smoothed curves, None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for label, curve in losses.items():
        axes.plot(smoothed(curve), label=label, linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, mean of 25 steps")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    return path


def write_report(results: Path, out: Path) -> None:
    """Write `out` and the plots beside it."""
    lines = [INTRODUCTION, *goal_lines(results)]
    for stem, entries in load(results, "step-*.json"):
        lines += [f"## Training step: {stem.removeprefix('step-')}", ""]
        for entry in sorted(entries, key=lambda e: (e["size"], e["precision"], e["batching"])):
            lines += step_section(entry)
    for stem, result in load(results, "precision-*.json"):
        lines += precision_section(stem, result, out)
    for stem, kernels in load(results, "kernels-*.json"):
        tables = [
            line
            for title, entry in kernels.items()
            for line in kernel_section(title, entry.get("providers", {}))
        ]
        lines += [f"## Kernels: {stem}", "", *tables] if tables else []
    out.write_text("\n".join(lines).rstrip() + "\n")


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    arguments = parser.parse_args()
    write_report(arguments.results, arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
