"""A training step finds every kernel in the bundle: Triton's launch path never compiles.

Runs with MASKED_VIT_KERNELS_CACHE naming the bundle (ctest sets it).
"""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton
from masked_vit_kernels import bundle
from masked_vit_kernels.tokens.sum_by_place import segmented_sum_launch
from step_launches import step_launches
from stub_gpu import install_stub_driver
from triton.compiler import ASTSource

BUNDLE = Path(os.environ[bundle.VARIABLE])
ARCHS = sorted(int(arch) for arch in (BUNDLE.parent / "aot/archs.txt").read_text().split(";"))
# bf16-params is the mode of one GPU; autocast and the paper's loss add kernels of their own.
STEPS = (
    ("vitb16", "bf16-params"), ("vitl16", "bf16-params"), ("vith14", "bf16-params"),
    ("vith16-448", "bf16-params"), ("vitg16", "bf16-params"), ("vitb16-paper", "bf16"),
    ("vith14", "bf16"),
)  # fmt: skip
STUB = install_stub_driver()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Whatever is compiled all the same stays out of the bundle and of the next test."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))


def _refuse(self, *_):
    raise AssertionError(f"{self.name} is compiled: the bundle lacks it")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("recipe", "precision"), STEPS)
def test_the_first_step_compiles_nothing(recipe, precision, arch):
    launches = step_launches(recipe, precision, arch)
    assert len(launches) > 20
    STUB.device = arch
    before = sorted(path.name for path in BUNDLE.iterdir())
    with mock.patch.object(ASTSource, "make_ir", _refuse):
        for launch in launches:
            launch._launch()
    assert sorted(path.name for path in BUNDLE.iterdir()) == before


def test_a_launch_outside_the_bundle_is_compiled_elsewhere(tmp_path):
    values, ids = torch.empty(64, 32), torch.empty(64, dtype=torch.int64)
    launch = segmented_sum_launch(values, ids, torch.empty(9, dtype=torch.int64), values[:8])
    STUB.device = ARCHS[0]
    before = sorted(path.name for path in BUNDLE.iterdir())
    with mock.patch.object(ASTSource, "make_ir", _refuse), pytest.raises(AssertionError):
        launch._launch()
    launch._launch()
    assert list(tmp_path.glob("*/*.cubin"))
    assert sorted(path.name for path in BUNDLE.iterdir()) == before
