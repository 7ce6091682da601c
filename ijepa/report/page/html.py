"""The page itself: what is known of some runs as one HTML file that needs nothing else.

Whatever comes from a run's folder is somebody's text: it is escaped wherever it is written, the
curves reach the script as JSON, and a content security policy lets the page load nothing and run no
script but its own, whose hash it names.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from ijepa.evaluate.warnings import learning_warnings
from ijepa.printable import printable
from ijepa.report.page.series import Curve, Line, curves, finite, line_of, other_curves
from ijepa.report.page.settings import differing_settings, flat_settings
from ijepa.report.probes import Probes
from ijepa.report.summary import probe_cells

_COLOURS = 8  # of page.css, taken in turn


@dataclass(frozen=True)
class PageRun:
    """What is known of a run.

    Attributes:
        name: for people, distinct among the runs of a page.
        metrics: lines of its log.
        settings: as in recipe.json; None where it cannot be read.
        probes: its closing table, if there is one.
        versions, machine: as the last checkpoint says; empty where it does not.
        step: of that checkpoint.
        notes: what is missing, and why.
    """

    name: str
    metrics: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any] | None = None
    probes: Probes | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)
    step: int | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class PagePicture:
    """An encoded picture.

    Attributes:
        section: heading that it stands under.
        kind: "png" or "jpeg".
        data: the file's bytes.
        size: (width, height) in pixels.
    """

    section: str
    title: str
    caption: str
    kind: str
    data: bytes
    size: tuple[int, int]


def render_page(runs: Sequence[PageRun], pictures: Sequence[PagePicture], made: str) -> str:
    """The HTML of some runs.

    Args:
        runs: at least one; curves are overlaid, settings compared.
        pictures: in their order, those of one section together.
        made: when and by what, for the foot of the page.

    Raises:
        ValueError: no run.
    """
    if not runs:
        raise ValueError("a report needs at least one run")
    drawn = _drawn(runs)
    style, script = _resource("page.css"), _resource("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    title = ", ".join(run.name for run in runs)
    sections = [
        ("summary", "Runs", _runs(runs)),
        ("curves", "Curves", _charts(drawn, panel=False)),
        ("panel", "Collapse panel", _panel(runs, drawn)),
        ("probes", "Accuracy on held-out images", _probes(runs)),
        *_pictures(pictures),
        ("settings", "Settings", _settings(runs)),
        ("machine", "Machine and versions", _machine(runs)),
    ]
    shown = [(anchor, name, body) for anchor, name, body in sections if body]
    links = "".join(f'<a href="#{anchor}">{_text(name)}</a>' for anchor, name, _ in shown)
    body = "\n".join(
        f'<section id="{anchor}"><h2>{_text(name)}</h2>\n{content}</section>'
        for anchor, name, content in shown
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_text(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>
{style}</style>
</head>
<body>
<h1>{_text(title)}</h1>
<nav>{links}</nav>
{body}
<p class="note">{_text(made)}</p>
<script type="application/json" id="data">{_json(drawn)}</script>
<script>{script}</script>
</body>
</html>
"""


def _text(text: str) -> str:
    """Text of anybody's as HTML."""
    return html.escape(printable(text), quote=True)


def _json(drawn: Sequence[tuple[Curve, list[Line]]]) -> str:
    """The curves for the script; nothing in it can end the element that holds it."""
    charts = [
        {
            "low": curve.low,
            "high": curve.high,
            "collapsed": curve.collapsed,
            "lines": [
                {
                    "run": line.run,
                    "x": line.steps,
                    "y": line.values,
                    "many": line.many,
                }
                for line in lines
            ],
        }
        for curve, lines in drawn
    ]
    return json.dumps({"charts": charts}, allow_nan=False).replace("<", "\\u003c")


def _drawn(runs: Sequence[PageRun]) -> list[tuple[Curve, list[Line]]]:
    """Curves of which some run has points."""
    widths = {_setting(run, "model", "width") for run in runs}
    width = widths.pop() if len(widths) == 1 else None
    guesses = {
        float(line["knn_guessing"])
        for run in runs
        for line in run.metrics
        if finite(line.get("knn_guessing"))
    }
    guessing = guesses.pop() if len(guesses) == 1 else None
    wanted = curves(width if isinstance(width, int) else None, guessing)
    wanted += other_curves([run.metrics for run in runs])
    found = []
    for curve in wanted:
        lines = [line_of(run.metrics, curve.name, number) for number, run in enumerate(runs)]
        present = [line for line in lines if line is not None]
        if present:
            found.append((curve, present))
    return found


def _setting(run: PageRun, table: str, key: str) -> Any:
    entries = (run.settings or {}).get(table)
    return entries.get(key) if isinstance(entries, Mapping) else None


def _dot(run: int) -> str:
    return f'<span class="dot" style="background:var(--c{run % _COLOURS})"></span>'


def _runs(runs: Sequence[PageRun]) -> str:
    boxes = "".join(
        f'<label><input type="checkbox" checked data-run="{number}">{_dot(number)}'
        f"{_text(run.name)}</label>"
        for number, run in enumerate(runs)
    )
    rows = [["run", "steps", "loss at the end", "images/s"]]
    notes = []
    for run in runs:
        losses = [line for line in run.metrics if finite(line.get("loss"))]
        rates = sorted(
            line["images_per_second"]
            for line in run.metrics
            if finite(line.get("images_per_second"))
        )
        steps = [line["step"] for line in run.metrics if finite(line.get("step"))]
        rows.append(
            [
                run.name,
                f"{max(steps):,.0f}" if steps else "none",
                f"{losses[-1]['loss']:.4f}" if losses else "unknown",
                f"{rates[len(rates) // 2]:,.0f}" if rates else "unknown",
            ]
        )
        notes += [f'<p class="note">{_text(f"{run.name}: {note}")}</p>' for note in run.notes]
    return f'<div class="runs">{boxes}</div>\n{_table(rows, figures=True)}\n{"".join(notes)}'


_TOOLS = """<div class="tools">
<button data-zoom="in">closer</button> <button data-zoom="out">wider</button>
<button data-zoom="left" aria-label="earlier steps">&larr;</button>
<button data-zoom="right" aria-label="later steps">&rarr;</button>
<button data-zoom="all">all</button> <span class="note" id="range"></span></div>
<p class="note">Drag across a curve to look closer, double-click to see all. Faint: as logged; firm:
running mean.</p>
"""


def _charts(drawn: Sequence[tuple[Curve, list[Line]]], panel: bool) -> str:
    cards = "".join(
        f'<div class="chart" id="chart-{number}"><h3>{_text(curve.title)}</h3>'
        f'<svg viewBox="0 0 400 190" role="img" aria-label="{_text(curve.title)}"></svg>'
        f'<div class="readout"></div>{_healthy(curve)}</div>'
        for number, (curve, _) in enumerate(drawn)
        if curve.panel == panel
    )
    if not cards:
        return ""
    return ("" if panel else _TOOLS) + f'<div class="charts">{cards}</div>\n'


def _healthy(curve: Curve) -> str:
    return f'<p class="note">{_text(curve.healthy)}</p>' if curve.healthy else ""


def _panel(runs: Sequence[PageRun], drawn: Sequence[tuple[Curve, list[Line]]]) -> str:
    charts = _charts(drawn, panel=True)
    if not charts:
        return ""
    words = (
        '<p class="note">The loss is a proxy: it falls while targets are easy and rises again when '
        "they begin to carry content. Shaded: where healthy runs lie, where a limit is known "
        "(provisional, from small runs). Dotted red: targets that have become constant.</p>"
    )
    warnings = []
    for run in runs:
        panels = [line for line in run.metrics if finite(line.get("effective_rank"))]
        width = _setting(run, "model", "width")
        warmup = _setting(run, "schedule", "warmup_steps")
        if not panels or not isinstance(width, int) or not isinstance(warmup, int):
            continue
        figures = {name: value for name, value in panels[-1].items() if finite(value)}
        if "step" not in figures:
            continue
        warnings += [
            f'<p class="warning">{_text(f"{run.name}: {sentence}")}.</p>'
            for sentence in learning_warnings(figures, width, warmup).values()
        ]
    return words + "".join(warnings) + charts


def _probes(runs: Sequence[PageRun]) -> str:
    parts = []
    for run in runs:
        if run.probes is None:
            continue
        parts.append(f"<h3>{_text(run.name)}</h3>{_table(probe_cells(run.probes), figures=True)}")
    if not parts:
        return ""
    note = (
        '<p class="note">Linear probe: logistic regression on standardised features. kNN: 20 '
        "neighbours by cosine, of features as they are and whitened.</p>"
    )
    return "".join(parts) + note


def _pictures(pictures: Sequence[PagePicture]) -> list[tuple[str, str, str]]:
    found: dict[str, list[str]] = {}
    for picture in pictures:
        code = base64.b64encode(picture.data).decode()
        width, height = picture.size
        kind = ' class="large"' if width > 640 else ""
        found.setdefault(picture.section, []).append(
            f"<figure><h3>{_text(picture.title)}</h3>"
            f'<div class="wide"><img{kind} width="{width}" height="{height}" '
            f'alt="{_text(picture.title)}" src="data:image/{picture.kind};base64,{code}"></div>'
            f"<figcaption>{_text(picture.caption)}</figcaption></figure>\n"
        )
    return [
        (f"pictures-{number}", section, "".join(figures))
        for number, (section, figures) in enumerate(found.items())
    ]


def _settings(runs: Sequence[PageRun]) -> str:
    known = [run for run in runs if run.settings is not None]
    if not known:
        return ""
    flat = [flat_settings(run.settings or {}) for run in known]
    header = ["setting", *(run.name for run in known)]
    parts = []
    if len(known) > 1:
        rows = differing_settings(flat)
        parts.append(_table([header, *rows]) if rows else "<p>The runs have the same settings.</p>")
    names = sorted({name for settings in flat for name in settings})
    every = [[name, *(settings.get(name, "") for settings in flat)] for name in names]
    parts.append(f"<details><summary>All settings</summary>{_table([header, *every])}</details>")
    return "".join(parts)


def _machine(runs: Sequence[PageRun]) -> str:
    facts = [{**run.machine, **run.versions} for run in runs]
    names = list(dict.fromkeys(name for found in facts for name in found))
    if not names:
        return ""
    rows = [[name, *(found.get(name, "") for found in facts)] for name in names]
    return _table([["", *(run.name for run in runs)], *rows])


def _table(rows: Sequence[Sequence[str]], figures: bool = False) -> str:
    """Header and rows; columns after the first are figures, aligned to the right, if so said."""
    kind = ' class="figure"' if figures else ""

    def line(cells: Sequence[str], tag: str) -> str:
        first, *rest = cells
        written = f"<{tag}>{_text(first)}</{tag}>"
        return written + "".join(f"<{tag}{kind}>{_text(cell)}</{tag}>" for cell in rest)

    header, *body = rows
    lines = ""
    for row in body:
        strong = ' class="pretrained"' if row[0].startswith("pretrained") else ""
        lines += f"<tr{strong}>{line(row, 'td')}</tr>"
    head = f"<thead><tr>{line(header, 'th')}</tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>{lines}</tbody></table></div>'


def _resource(name: str) -> str:
    return (resources.files("ijepa.report.page") / name).read_text(encoding="utf-8")
