"""Each listed mistake in a kernel's source is noticed by a check that passes without it."""

import importlib
from pathlib import Path

import pytest
from mutation import Mutation, run_check

pytestmark = pytest.mark.interpreter

MUTATIONS: list[Mutation] = [
    mutation
    for path in sorted((Path(__file__).parent / "mutations").glob("[!_]*.py"))
    for mutation in importlib.import_module(f"mutations.{path.stem}").MUTATIONS
]


def _test_id(mutation: Mutation) -> str:
    return f"{mutation.file}: {mutation.name}"


@pytest.mark.parametrize("mutation", MUTATIONS, ids=_test_id)
def test_mutation_is_noticed(mutation, tmp_path):
    try:
        run_check(mutation, tmp_path, mutated=True)
    except Exception:  # the check failed, or the mutated kernel crashed: noticed either way
        return
    pytest.fail(f"nothing noticed: {mutation.name}")


@pytest.mark.parametrize("mutation", {m.check: m for m in MUTATIONS}.values(), ids=_test_id)
def test_check_passes_without_the_mutation(mutation, tmp_path):
    run_check(mutation, tmp_path, mutated=False)
