"""A folder of compiled kernels serves Triton's compiler in place of compiling, wherever it lies."""

import shutil

import pytest
import torch
import triton
from masked_vit_kernels import bundle, launch
from masked_vit_kernels.compile import compile_launch
from masked_vit_kernels.optimizer.ema import ema_launch
from masked_vit_kernels.optimizer.multi_tensor import TILE
from triton.compiler import ASTSource


@pytest.fixture(autouse=True)
def _restored_cache(tmp_path):
    """Triton's cache in a folder of the test; whatever it was afterwards."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path / "cache")
        yield


def _launch(source: torch.dtype = torch.float32):
    tiles = torch.empty(TILE, 2, dtype=torch.int32, device="meta")
    table = torch.empty(8, 4, dtype=torch.int64, device="meta")
    return ema_launch(tiles, table, 0.9, source)


def _compiles(monkeypatch, launch) -> bool:
    """Whether Triton's front end runs."""
    ran = []
    original = ASTSource.make_ir

    def noted(self, *rest):
        ran.append(1)
        return original(self, *rest)

    monkeypatch.setattr(ASTSource, "make_ir", noted)
    compile_launch(launch, 90)
    monkeypatch.undo()
    return bool(ran)


@pytest.mark.audit
def test_a_moved_bundle_is_read_first_and_never_written(monkeypatch, tmp_path):
    built = compile_launch(_launch(), 90).asm["cubin"]
    folder = tmp_path / "elsewhere" / "bundle"
    folder.parent.mkdir()
    shutil.move(tmp_path / "cache", folder)
    assert _compiles(monkeypatch, _launch())
    shutil.rmtree(tmp_path / "cache")

    (folder / bundle.VERSION_FILE).write_text(triton.__version__ + "\n")
    bundle.use_bundle(folder)
    before = sorted(folder.rglob("*"))
    assert not _compiles(monkeypatch, _launch())
    assert compile_launch(_launch(), 90).asm["cubin"] == built
    assert _compiles(monkeypatch, _launch(torch.bfloat16))  # not in the bundle
    assert not _compiles(monkeypatch, _launch(torch.bfloat16))  # but in Triton's own cache now
    assert sorted(folder.rglob("*")) == before


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"{bundle.VARIABLE} must name the bundle"):
        bundle.use_bundle(tmp_path)


def test_a_bundle_of_another_triton_is_refused(tmp_path):
    (tmp_path / bundle.VERSION_FILE).write_text("2.0.0\n")
    with pytest.raises(ValueError, match=r"compiled by Triton 2\.0\.0, this is"):
        bundle.use_bundle(tmp_path)


def test_the_first_launch_reads_the_environment(monkeypatch, tmp_path):
    """Not the import: a wrong path is no reason why the reference or the audit should not load."""
    monkeypatch.setenv(bundle.VARIABLE, str(tmp_path))
    launch._use_bundle_once.cache_clear()
    with pytest.raises(ValueError, match="must name the bundle"):
        _launch()._launch()


def test_the_environment_names_the_bundle(monkeypatch, tmp_path):
    monkeypatch.setenv(bundle.VARIABLE, str(tmp_path))
    with pytest.raises(ValueError, match="must name the bundle"):
        bundle.use_bundle_of_environment()
    monkeypatch.delenv(bundle.VARIABLE)
    bundle.use_bundle_of_environment()
