"""The op library as its users get it: with torch alone, without Triton, and quick to import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What a machine without Triton looks like: the import fails before anything is found.
HIDE_TRITON = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name="triton")
sys.meta_path.insert(0, Hidden())
"""

EVERY_OP = """
import torch
import masked_vit_kernels as mvk
packing = mvk.pack_lengths([3, 0, 5])
qkv = torch.randn(8, 3, 2, 8, requires_grad=True)
out = mvk.varlen_attention_qkvpacked(qkv, packing.cu_seqlens, packing.max_seqlen, packing=packing)
out.sum().backward()
images, weight = torch.rand(3, 3, 8, 8), torch.randn(16, 3, 4, 4, requires_grad=True)
ids = torch.tensor([0, 1, 2, 0, 1, 2, 3, 0])
tokens = mvk.embed_visible_patches(images, weight, None, torch.randn(4, 16), ids, packing)
whole = mvk.scatter_tokens(tokens[:3], ids[:3], torch.zeros(16), 4)
mvk.gather_tokens(whole, ids[:2])
mvk.latent_prediction_loss(tokens, torch.randn(3, 4, 16), ids).backward()
average = [weight.detach().clone()]
mvk.ema_update_(average, [weight.detach()], 0.9)
mvk.AdamWEMA([weight], ema=[(average[0], weight)]).step()
"""


def run(script: str) -> str:
    """What a fresh interpreter prints, with the op library alone on its path."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_op_runs_on_the_cpu_without_triton():
    told = run(HIDE_TRITON + EVERY_OP + "print('triton' in sys.modules)")
    assert told.strip() == "False"


def test_without_triton_a_kernel_says_what_it_needs():
    launch = """
from masked_vit_kernels.tokens import gather_kernels
try:
    gather_kernels._gather_rows_kernel[(1,)]
except RuntimeError as error:
    print(error)
"""
    told = run(HIDE_TRITON + launch)
    assert "_gather_rows_kernel needs Triton, which is not installed" in told


def test_nothing_but_torch_triton_and_numpy_is_imported():
    script = """
import sys, torch, triton, numpy
before = {name.partition(".")[0] for name in sys.modules}
import masked_vit_kernels
new = {name.partition(".")[0] for name in sys.modules} - before - set(sys.stdlib_module_names)
print(sorted(new))
"""
    assert run(script).strip() == "['masked_vit_kernels']"


@pytest.mark.parametrize("hide", ["", HIDE_TRITON], ids=["triton", "no triton"])
def test_importing_takes_under_a_second_beyond_torch(hide):
    """Processor time of one thread, so that a busy machine does not decide."""
    script = """
import time, torch
started = time.process_time()
import masked_vit_kernels
print(time.process_time() - started)
"""
    assert min(float(run(hide + script)) for _ in range(3)) < 1.0
