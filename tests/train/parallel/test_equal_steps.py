"""DDP, FSDP2 and HSDP take the steps that a single process takes on the same global batch."""

from __future__ import annotations

import functools
from unittest import mock

import pytest
import torch
from rank_cases import make_trainer, on_ranks, step, whole_weights

STEPS = 10
# (parallel, micro-batches, precision, compile)
CASES = [
    (parallel, accumulate, precision, False)
    for parallel in ("ddp", "fsdp", "hsdp")
    for accumulate in (1, 2)
    for precision in ("fp32", "bf16-params")
] + [
    ("ddp", 1, "bf16", False),
    ("fsdp", 1, "bf16", False),
    ("ddp", 2, "fp32", True),
    ("fsdp", 2, "fp32", True),
    ("fsdp", 1, "bf16-params", True),
]


def train(parallel: str, accumulate: int, precision: str, compile: bool) -> dict:
    if compile:  # traced and cut as on a GPU; Inductor's own code has its tests
        torch._dynamo.reset()
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager")):
        trainer = make_trainer(parallel=parallel, precision=precision, compile=compile)
    figures = []
    for number in range(STEPS):
        result = step(trainer, number, accumulate)
        figures.append(torch.stack([result.loss, result.grad_norm]))
    return {"figures": torch.stack(figures), "weights": whole_weights(trainer)}


def train_all(cases: list) -> list:
    return [train(*case) for case in cases]


@pytest.fixture(scope="module")
def alone():
    """Figures and weights of a single process by (micro-batches, precision)."""
    found = {}

    def run(accumulate, precision):
        key = (accumulate, precision)
        if key not in found:
            found[key] = train("ddp", accumulate, precision, False)
        return found[key]

    return run


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_take_the_steps_of_one_process(ranks, alone, tmp_path):
    cases = [case for case in CASES if ranks == 4 or case[0] != "hsdp"]
    results = on_ranks(train_all, ranks, tmp_path, cases)
    for number, (parallel, accumulate, precision, compiled) in enumerate(cases):
        case = f"{ranks} ranks, {parallel}, {accumulate} micro-batches, {precision}, {compiled=}"
        mine = [result[number] for result in results]
        # shards know one kind of bfloat16: rounded copies of float32 weights
        rounded = "bf16-params" if parallel != "ddp" and precision != "fp32" else precision
        whole = alone(accumulate, rounded)
        exact = alone(accumulate, "fp32")
        for rank in range(1, ranks):  # every rank has the same
            assert torch.equal(mine[0]["figures"], mine[rank]["figures"]), case
            for name, tensor in mine[0]["weights"].items():
                assert torch.equal(tensor, mine[rank]["weights"][name]), f"{case}: {name}"
        if precision == "fp32":
            torch.testing.assert_close(
                mine[0]["figures"], whole["figures"], atol=1e-5, rtol=1e-5, msg=case
            )
            for name, tensor in whole["weights"].items():
                torch.testing.assert_close(
                    mine[0]["weights"][name], tensor, atol=1e-5, rtol=0, msg=f"{case}: {name}"
                )
            continue
        # bfloat16's own error: how far a single process is from its float32 self
        for part in ("figures", "weights"):
            own = (flat(whole[part]) - flat(exact[part])).norm()
            assert (flat(mine[0][part]) - flat(whole[part])).norm() <= 1.5 * own, f"{case}: {part}"


def flat(values) -> torch.Tensor:
    """All values in one row."""
    if isinstance(values, dict):
        return torch.cat([values[name].flatten() for name in sorted(values)])
    return values.flatten()
