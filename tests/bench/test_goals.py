"""`bench/goals.py` on made-up results: what is met, what is not, what has no figure."""

import importlib
import json
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def goals():
    return importlib.import_module("bench.goals")


def table(peers, share=0.7, **facts):
    rows = {"ours": {"us": 100.0, "share_of_copy": share, "same": True}}
    rows |= {name: {"us": us, "same": same} for name, (us, same) in peers.items()}
    return {"copy_gigabytes_per_second": 4300.0, "providers": rows, **facts}


def attention(direction, head_dim, peers, longest=200, equal=False, **facts):
    return table(
        peers, op="attention", part="target" if equal else "context", direction=direction,
        head_dim=head_dim, longest=longest, equal_lengths=equal, shape=f"S{longest}", **facts,
    )  # fmt: skip


def results(goals, kernels):
    return goals.Results(dict(enumerate(kernels)), [])


def by_number(found):
    return {(goal.number, goal.target): goal for goal in found}


def test_without_results_nothing_is_met_or_missed(goals):
    found = goals.goals_of(goals.Results({}, []), goals.Results({}, []))
    assert sorted({goal.number for goal in found}) == list(range(1, 13))
    assert all(goal.met is None and goal.figure == "no figure" for goal in found)


def test_attention(goals):
    facts = {"deterministic": True, "workspace_in_rows": 0.02}
    kernels = [
        attention("forward", 24, {"torch varlen_attn": (150, True), "fast but wrong": (50, False)}),
        attention("forward", 80, {"FlexAttention, compiled": (120, True)}),
        attention("forward", 64, {"SDPA cuDNN": (101, True)}, equal=True),
        attention(
            "backward", 24, {"torch varlen_attn": (180, True), "xformers": (90, True)}, **facts
        ),
        attention("backward", 80, {"SDPA cuDNN": (10, True)}, longest=784, equal=True),
    ]
    found = by_number(goals.goals_of(results(goals, kernels), results(goals, [])))
    verdicts = {key: goal.met for key, goal in found.items() if key[0] <= 6}
    assert verdicts == {
        (1, "60 % of the floor"): True,
        (2, "1.3x"): False,
        (3, "1.0x"): True,
        (4, "50 % of the floor"): True,
        (4, "1.7x"): True,
        (5, "yes"): True,
        (6, "0.85x"): False,
    }
    assert (
        found[2, "1.3x"].figure == "1.20x at the least (S200 D=80 forward, FlexAttention, compiled)"
    )
    assert "without D=[32, 88]" in found[1, "60 % of the floor"].what
    kernels[3]["workspace_in_rows"] = 2.0
    found = by_number(goals.goals_of(results(goals, kernels), results(goals, [])))
    assert found[5, "yes"].met is False


def test_predictions_stand_beside_the_targets(goals):
    def expected(direction, head_dim, share, **facts):
        return attention(direction, head_dim, {}, **facts) | {"share_of_floor": share}

    predictions = [
        expected("forward", 24, [0.32, 0.36]),
        expected("forward", 80, [0.40, 0.45]),
        expected("forward", 32, [0.30, 0.90]),  # D=32 is no head dim of goal 2
        expected("forward", 64, [0.35, 0.66], equal=True),
        expected("backward", 80, [0.28, 0.99]),
        expected("backward", 64, [0.01, 0.02], equal=True),  # no lengths as drawn
        expected("backward", 24, [0.07, 0.16], longest=694),
    ]
    found = by_number(goals.goals_of(results(goals, []), results(goals, predictions)))
    assert {key: goal.predicted for key, goal in found.items() if goal.predicted} == {
        (1, "60 % of the floor"): "30% to 90% of the floor (S200 D=32 forward)",
        (2, "1.3x"): "32% to 36% of the floor (S200 D=24 forward)",
        (3, "1.0x"): "35% to 66% of the floor (S200 D=64 forward)",
        (4, "50 % of the floor"): "28% to 99% of the floor (S200 D=80 backward)",
        (4, "1.7x"): "28% to 99% of the floor (S200 D=80 backward)",
        (6, "0.85x"): "7% to 16% of the floor (S694 D=24 backward)",
    }


def test_the_table_shows_predictions_and_their_origin(goals, tmp_path, monkeypatch):
    row = attention("forward", 24, {}) | {"share_of_floor": [0.32, 0.36]}
    filed = {"commit": "abc1234", "date": "2026-11-26", "predictions": [row]}
    monkeypatch.setattr(goals, "PREDICTIONS", tmp_path / "predictions.json")
    goals.PREDICTIONS.write_text(json.dumps(filed))
    measured = attention("forward", 24, {}, share=0.41)
    (tmp_path / "kernels-Some-GPU.json").write_text(json.dumps({"a": measured}))
    lines = goals.goal_lines(tmp_path)
    (first,) = [line for line in lines if line.startswith("| 1 |")]
    cells = [cell.strip() for cell in first.split("|")[2:-1]]
    assert cells[1:] == [
        "60 % of the floor",
        "32% to 36% of the floor (S200 D=24 forward)",
        "41% at the least (S200 D=24 forward)",
        "no",
    ]
    header = next(line for line in lines if line.startswith("| #"))
    assert all(line.count("|") == header.count("|") for line in lines if line.startswith("|"))
    (note,) = [line for line in lines if line.startswith("Predicted")]
    assert "2026-11-26" in note
    assert "abc1234" in note


def test_times_are_scaled_by_the_copy_and_steps_take_our_fastest(goals, tmp_path):
    def loss(direction):
        peers = {"layer_norm, index, smooth_l1": (500, True)}
        return table(peers, op="loss", shape="H/14 batch 128", direction=direction)

    optimizer = table({"fused": (150, True), "loop": (310, True)}, op="optimizer", model="H",
                      gradients="bfloat16")  # fmt: skip
    optimizer["copy_gigabytes_per_second"] = 2150.0
    for row in optimizer["providers"].values():
        row["us"] *= 120  # 12 ms, where 6.9 on an H200 is 13.8
    kernels = {"f": loss("forward"), "b": loss("backward"), "o": optimizer}
    kernels["c"] = {"op": "ceilings", "copy_gigabytes_per_second": 2150.0,
                    "providers": {"square": {"us": 1.0, "teraflops": 700.0}}}  # fmt: skip
    rows = {
        "ours": {"ms": 100.0, "mfu": 0.3, "images_per_second": 2560},
        "ours, bf16 weights, compiled, graph": {"ms": 50, "mfu": 0.6, "images_per_second": 5120},
        "ours without kernels": {"ms": 40, "mfu": 0.7, "images_per_second": 6400},
        "released style": {"ms": 90.0},
        "best stock, compiled": {"ms": 52.0},
    }
    step = {"size": "B/16", "batching": "truncate", "precision": "bf16", "providers": rows}
    (tmp_path / "kernels-Some-GPU.json").write_text(json.dumps(kernels))
    (tmp_path / "step-Some-GPU.json").write_text(json.dumps([step]))
    lines = "\n".join(goals.goal_lines(tmp_path))
    assert "| 12.00 ms (here 13.80), 1.50x, 3.10x | yes |" in lines
    assert "| 0.200 ms (here 0.080), 5.00x | no |" in lines
    assert "| 11 | step MFU, B/16 | 50% |  | 60% at the least" in lines
    assert "| 1.80x, 1.04x (ours, bf16 weights, compiled, graph, 5120 img/s) | no |" in lines
    assert "Copy 2150 GB/s; matrix products in TFLOP/s: square 700.0." in lines
    assert (
        "| 12 | step against released style and best stock, H/14 | 1.6x, 1.08x |  | no figure |  |"
        in lines
    )


def test_the_report_takes_the_committed_results(goals, tmp_path, monkeypatch):
    """Predictions lie among the results; every kernel table and step still has its section."""
    report = importlib.import_module("bench.report")
    monkeypatch.setattr(report, "precision_section", lambda stem, result, out: [f"({stem})"])
    for path in (BENCH / "results").glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    rows = {"ours": {"us": 1.0, "gigabytes_per_second": 2.0, "share_of_copy": 0.5, "same": True,
                     "ratio": 1.0, "error": 0.0}}  # fmt: skip
    (tmp_path / "kernels-Some-GPU.json").write_text(json.dumps({"a table": {"providers": rows}}))
    report.write_report(tmp_path, tmp_path / "RESULTS.md")
    text = (tmp_path / "RESULTS.md").read_text()
    assert "## Kernels: kernels-Some-GPU" in text
    assert "a table" in text
    assert text.count("## Training step:") == len(list(tmp_path.glob("step-*.json")))
    assert "predictions-sm90" not in text
