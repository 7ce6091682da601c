"""The op library's README lists every op, and the files and tests that it names exist."""

import re
from pathlib import Path

import masked_vit_kernels
import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "kernels/masked_vit_kernels"
ROWS = {
    cells[1].strip().strip("`"): cells
    for line in (PACKAGE / "README.md").read_text().splitlines()
    if len(cells := line.split("|")) == 9 and cells[1].strip().startswith("`")
}
PACKING = {
    "Packing", "PredictorPacking", "PrefixPacking", "choose_capacity", "pack_lengths",
    "pack_predictor", "pack_prefix", "packing_from_cu_seqlens",
}  # fmt: skip


def test_every_exported_op_has_a_row():
    assert set(ROWS) == set(masked_vit_kernels.__all__) - PACKING


@pytest.mark.parametrize("op", ROWS)
def test_files_and_tests_of_a_row_exist(op):
    _, _, _, _, _, file, tests, verified, _ = ROWS[op]
    path = PACKAGE / file.strip().strip("`")
    assert re.search(rf"^(def|class) {op}\b", path.read_text(), flags=re.MULTILINE)
    named = re.findall(r"[\w/]*test_\w+\.py", tests)
    assert named or tests.strip() == "the same"
    assert all((TESTS / name).exists() for name in named)
    assert verified.strip()
