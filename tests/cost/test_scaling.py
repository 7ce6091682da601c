"""What GPUs send each other, as planned: the arithmetic, the limits, the command."""

from __future__ import annotations

import dataclasses

import pytest

from ijepa.cli import main
from ijepa.cost.communication import step_traffic
from ijepa.cost.plan import plan_recipe
from ijepa.recipes import load_recipe

SIZES = {"trained": 1000, "averaged": 800, "units": 5, "weight_bytes": 2, "gpus_a_machine": 8}


@pytest.mark.parametrize(
    ("parallel", "gpus", "micro_batches", "inside", "between"),
    [
        ("ddp", 1, 1, 0, 0),
        ("ddp", 4, 3, 2 * 3 / 4 * 4000, 0),  # micro-batches add up before they travel
        ("fsdp", 4, 1, 3 / 4 * (2 * 2800 + 4000), 0),
        ("fsdp", 4, 3, 3 * 3 / 4 * (2 * 2800 + 4000), 0),
        ("hsdp", 32, 3, 3 * 7 / 8 * (2 * 2800 + 4000), 2 * 3 / 4 * 4000 / 8),
    ],
)
def test_bytes_of_a_step(parallel, gpus, micro_batches, inside, between):
    traffic = step_traffic(parallel, gpus=gpus, micro_batches=micro_batches, **SIZES)
    assert traffic.inside == pytest.approx(inside)
    assert traffic.between == pytest.approx(between)


def test_sending_is_never_free_and_memory_decides():
    recipe = load_recipe("vith14")
    train = dataclasses.replace(recipe.train, accumulate=1)
    recipe = dataclasses.replace(recipe, train=train)
    plan = plan_recipe(recipe, gpu="h100", gpus=1024)
    assert [p.gpus for p in plan.points] == [2**k for k in range(11)]
    for point in plan.points:
        for parallel, seconds in point.seconds.items():
            assert (seconds is None) == (point.memory[parallel] > plan.room)
            assert seconds is None or seconds >= point.computing
            if point.gpus > 8 and parallel != "ddp":
                assert point.memory[parallel] < point.memory["ddp"]
    shared = [p.computing / p.seconds[p.best] for p in plan.points if p.best is not None]
    assert shared == sorted(shared, reverse=True)  # a fixed batch scales worse and worse


def test_the_command_says_what_to_take(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    pytest.importorskip("matplotlib")
    arguments = ["plan", "vitb16", "--gpus", "16", "--gpu", "a100", "--train.accumulate", "1"]
    assert main([*arguments, "--plot", str(tmp_path / "scaling.png")]) == 0
    out = capsys.readouterr().out
    assert "On 16 GPUs: train.parallel 'ddp'" in out and "time, sending counted" in out
    assert (tmp_path / "scaling.png").stat().st_size > 5000
