"""What the figures of one device say of the performance goals: each goal, its target, met or not.

python -m bench.goals --results bench/results        one table for each device with kernel results

Goals are set for an H200. Shares of the floor and ratios hold for any GPU; times are scaled by the
copy bandwidth that was measured beside them. A goal without results has no figure, not a failure.
Beside the targets of attention stand the shares of the floor that bench/ops/attention_estimate.py
expected on a Hopper GPU; it knows nothing of peers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from masked_vit_kernels.catalogue.sizes import HEAD_DIMS

HERE = Path(__file__).parent
PREDICTIONS = HERE / "results" / "predictions-sm90.json"
H200_COPY = 4300  # GB/s, read plus write: what the goals in milliseconds were set against
RELEASED_LOSS = "layer_norm, index, smooth_l1"
MFU_TARGETS = {"H/14": 0.60, "L/16": 0.55, "B/16": 0.50}


@dataclass(frozen=True)
class Goal:
    """`met` is None where nothing was measured."""

    number: int
    what: str
    target: str
    figure: str = "no figure"
    met: bool | None = None
    predicted: str = ""


@dataclass(frozen=True)
class Figure:
    """A measured number and what it was measured on."""

    value: float
    where: str


class Results:
    """The tables of one device."""

    def __init__(self, kernels: dict[str, dict], steps: list[dict]):
        self.kernels, self.steps = kernels, steps

    def tables(self, **facts: object) -> list[dict]:
        """Kernel tables about these facts; a fact may be a function that says whether it fits."""

        def fits(table: dict) -> bool:
            return all(
                name in table and (fact(table[name]) if callable(fact) else table[name] == fact)
                for name, fact in facts.items()
            )

        return [table for table in self.kernels.values() if fits(table)]


def ours(table: dict) -> dict:
    """Our own row, the first one."""
    return next(iter(table["providers"].values()))


def over(table: dict, *words: str) -> Figure | None:
    """The fastest peer's time over ours; with `words`, of peers whose names hold one of them."""
    (first, own), *others = table["providers"].items()
    peers = {
        name: row["us"]
        for name, row in others
        if not name.startswith(first)
        and row.get("same", True)
        and (not words or any(word in name for word in words))
    }
    if not peers:
        return None
    fastest = min(peers, key=peers.__getitem__)
    return Figure(peers[fastest] / own["us"], f"{name_of(table)}, {fastest}")


def name_of(table: dict) -> str:
    """What a table was measured on."""
    head_dim = f" D={table['head_dim']}" if "head_dim" in table else ""
    direction = f" {table['direction']}" if "direction" in table else ""
    return f"{table.get('shape') or 'ViT-' + table.get('model', '?')}{head_dim}{direction}"


def least(figures: Iterable[Figure | None]) -> Figure | None:
    """The smallest."""
    return min((f for f in figures if f is not None), key=lambda f: f.value, default=None)


def judged(
    number: int,
    what: str,
    target: str,
    figure: Figure | None,
    bound: float,
    form: str,
    predicted: str = "",
) -> Goal:
    """A goal that is met where the worst figure reaches the bound."""
    if figure is None:
        return Goal(number, what, target, predicted=predicted)
    shown = f"{form.format(figure.value)} at the least ({figure.where})"
    return Goal(number, what, target, shown, figure.value >= bound, predicted)


def share_of_floor(tables: list[dict]) -> Figure | None:
    """The smallest share of the copy's rate."""
    return least(Figure(ours(table)["share_of_copy"], name_of(table)) for table in tables)


@dataclass(frozen=True)
class AttentionTables:
    """Tables, or predictions with the same facts, that the goals of attention speak of."""

    short: list[dict]
    forward: list[dict]
    packed_forward: list[dict]
    dense_forward: list[dict]
    backward: list[dict]
    long: list[dict]

    @classmethod
    def of(cls, results: Results) -> AttentionTables:
        attention = {"op": "attention", "part": lambda part: part != "padded"}
        short = results.tables(**attention, longest=lambda n: n <= 256)
        forward = [t for t in short if t["direction"] == "forward"]
        packed = [t for t in forward if not t["equal_lengths"] and t["head_dim"] in (24, 80, 88)]
        dense = [t for t in forward if t["equal_lengths"] and t["head_dim"] == 64]
        backward = [t for t in short if t["direction"] == "backward" and not t["equal_lengths"]]
        long = results.tables(**attention, longest=lambda n: n > 256)
        return cls(short, forward, packed, dense, backward, long)


def predicted_share(predictions: list[dict]) -> str:
    """The smallest share of the floor predicted, from its longer to its overlapped time."""
    if not predictions:
        return ""
    worst = min(predictions, key=lambda row: row["share_of_floor"][0])
    low, high = worst["share_of_floor"]
    return f"{low:.0%} to {high:.0%} of the floor ({name_of(worst)})"


def attention_goals(results: Results, predictions: Results) -> list[Goal]:
    """Goals 1 to 6."""
    tables, expected = AttentionTables.of(results), AttentionTables.of(predictions)
    lacking = set(HEAD_DIMS) - {table["head_dim"] for table in tables.forward}
    note = f", without D={sorted(lacking)}" if tables.forward and lacking else ""
    return [
        judged(1, f"attention forward, N<=256, all head dims{note}", "60 % of the floor",
               share_of_floor(tables.forward), 0.60, "{:.0%}", predicted_share(expected.forward)),
        judged(2, "forward against the best peer, packed, D=24/80/88", "1.3x",
               least(map(over, tables.packed_forward)), 1.3, "{:.2f}x",
               predicted_share(expected.packed_forward)),
        judged(3, "forward against the best peer, dense, D=64", "1.0x",
               least(map(over, tables.dense_forward)), 1.0, "{:.2f}x",
               predicted_share(expected.dense_forward)),
        judged(4, "backward, N<=256, lengths as drawn", "50 % of the floor",
               share_of_floor(tables.backward), 0.50, "{:.0%}", predicted_share(expected.backward)),
        judged(4, "the same against varlen_attn", "1.7x",
               least(over(table, "varlen_attn") for table in tables.backward), 1.7, "{:.2f}x",
               predicted_share(expected.backward)),
        determinism(tables.short),
        judged(6, "N over 256 against the best peer, both directions", "0.85x",
               least(map(over, tables.long)), 0.85, "{:.2f}x", predicted_share(expected.long)),
    ]  # fmt: skip


def determinism(tables: list[dict]) -> Goal:
    """Goal 5: equal bits, and no float32 gradient of the queries (2 rows in half precision)."""
    what, target = "backward bitwise deterministic, no float32 dQ for N<=256", "yes"
    known = [table for table in tables if "deterministic" in table]
    if not known:
        return Goal(5, what, target)
    same = all(table["deterministic"] for table in known)
    largest = max((table.get("workspace_in_rows", 0.0) for table in known), default=0.0)
    figure = f"{'equal' if same else 'differing'} bits; workspace {largest:.2f} of an input's size"
    return Goal(5, what, target, figure, same and largest < 1)


def scaled(milliseconds: float, table: dict) -> float:
    """What a time on the H200 becomes on this device, by copy bandwidth."""
    return milliseconds * H200_COPY / table["copy_gigabytes_per_second"]


def optimizer_goals(results: Results) -> list[Goal]:
    """Goals 7 and 8, on ViT-H."""
    what = "AdamW, average, casts and gradient norm, ViT-H"
    target = "6.9 ms on an H200, 1.4x best stock, 3x released"
    goals = [Goal(7, what, target)]
    for table in results.tables(op="optimizer", model="H", gradients="bfloat16"):
        milliseconds, bound = ours(table)["us"] / 1e3, scaled(6.9, table)
        stock, released = over(table, "fused"), over(table, "loop")
        ratios = (stock.value, released.value) if stock and released else (0.0, 0.0)
        figure = f"{milliseconds:.2f} ms (here {bound:.2f}), {ratios[0]:.2f}x, {ratios[1]:.2f}x"
        met = milliseconds <= bound and ratios[0] >= 1.4 and ratios[1] >= 3
        goals = [Goal(7, what, target, figure, met)]
    averages = [over(table, "lerp") for table in results.tables(op="average", model="H")]
    what = "moving average alone against foreach lerp, ViT-H"
    return [*goals, judged(8, what, "0.95x", least(averages), 0.95, "{:.2f}x")]


def token_goals(results: Results) -> list[Goal]:
    """Goals 9 and 10."""
    gathers = results.tables(op="gather")
    released = [over(t, "torch.gather") for t in gathers if t["batching"] == "truncate"]
    what = "LayerNorm, gather and loss, forward and backward, H/14 batch 128"
    target = "0.08 ms on an H200, 5x the released chain"
    losses = results.tables(op="loss", shape=lambda shape: shape.startswith("H/14"))
    goal = Goal(10, what, target)
    if len(losses) == 2:
        own = sum(ours(table)["us"] for table in losses) / 1e3
        chain = sum(table["providers"][RELEASED_LOSS]["us"] for table in losses) / 1e3
        bound = scaled(0.08, losses[0])
        figure = f"{own:.3f} ms (here {bound:.3f}), {chain / own:.2f}x"
        goal = Goal(10, what, target, figure, own <= bound and chain / own >= 5)
    return [
        judged(9, "gather, forward and backward", "80 % of the copy",
               share_of_floor(gathers), 0.80, "{:.0%}"),
        judged(9, "gather against the released selection", "3x", least(released), 3, "{:.2f}x"),
        goal,
    ]  # fmt: skip


def step_goals(results: Results) -> list[Goal]:
    """Goals 11 and 12, of every model that was timed with truncated masks."""
    goals = []
    for size, bound in MFU_TARGETS.items():
        mfu, ratio = f"step MFU, {size}", f"step against released style and best stock, {size}"
        share, ratios = f"{bound:.0%}", "1.6x, 1.08x"
        entries = [
            entry for entry in results.steps
            if (entry["size"], entry["batching"]) == (size, "truncate")
            and entry["precision"] != "fp32"
        ]  # fmt: skip
        if not entries:
            goals += [Goal(11, mfu, share), Goal(12, ratio, ratios)]
            continue
        rows = entries[-1]["providers"]
        own = {
            name: row for name, row in rows.items()
            if name.startswith("ours") and "without kernels" not in name
        }  # fmt: skip
        name = min(own, key=lambda name: own[name]["ms"])
        goals.append(judged(11, mfu, share, Figure(own[name]["mfu"], name), bound, "{:.0%}"))
        others = [
            min((row["ms"] for label, row in rows.items() if label.startswith(kind)), default=None)
            for kind in ("released", "best stock")
        ]
        if None in others:
            goals.append(Goal(12, ratio, ratios))
            continue
        released, stock = (ms / own[name]["ms"] for ms in others)
        figure = (
            f"{released:.2f}x, {stock:.2f}x ({name}, {own[name]['images_per_second']:.0f} img/s)"
        )
        goals.append(Goal(12, ratio, ratios, figure, released >= 1.6 and stock >= 1.08))
    return goals


def goals_of(results: Results, predictions: Results) -> list[Goal]:
    """All of them, by number."""
    goals = attention_goals(results, predictions) + optimizer_goals(results)
    goals += token_goals(results) + step_goals(results)
    return sorted(goals, key=lambda goal: goal.number)


def prediction_note(filed: dict) -> str:
    """Where the predictions come from; older files have no played time."""
    longer = "played" if "played_us" in filed["predictions"][0] else "serial"
    return (
        f"Predicted on {filed['date']} for an H200 by `bench/ops/attention_estimate.py`, from the"
        f" sm_90 machine code of commit {filed['commit']}: the worst of the shapes, by the {longer}"
        " and by the overlapped time."
    )


def goal_lines(folder: Path) -> list[str]:
    """A Markdown table for each device that has kernel results in the folder."""
    lines = []
    filed = json.loads(PREDICTIONS.read_text())
    predictions = Results({str(n): row for n, row in enumerate(filed["predictions"])}, [])
    for path in sorted(folder.glob("kernels-*.json")):
        device = path.stem.removeprefix("kernels-")
        steps = folder / f"step-{device}.json"
        results = Results(
            json.loads(path.read_text()), json.loads(steps.read_text()) if steps.exists() else []
        )
        on_gpu = any(table.get("on_gpu") for table in results.kernels.values())
        lines += [f"## Goals: {device}" if on_gpu else f"## Goals, set for a GPU: {device}", ""]
        lines += ["| # | goal | target | predicted | figure | met |", "|---" * 6 + "|"]
        for goal in goals_of(results, predictions):
            met = {True: "yes", False: "no", None: ""}[goal.met]
            cells = (goal.number, goal.what, goal.target, goal.predicted, goal.figure, met)
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines += ["", prediction_note(filed), ""]
        for table in results.tables(op="ceilings"):
            rates = ", ".join(f"{n} {r['teraflops']:.1f}" for n, r in table["providers"].items())
            copy = table["copy_gigabytes_per_second"]
            lines += [f"Copy {copy:.0f} GB/s; matrix products in TFLOP/s: {rates}.", ""]
    return lines


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    print("\n".join(goal_lines(parser.parse_args().results)))


if __name__ == "__main__":
    main()
