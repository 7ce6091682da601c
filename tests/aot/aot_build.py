"""What the checks read of a build, whose folder the environment names (ctest sets it)."""

from __future__ import annotations

import json
import os
from pathlib import Path

from c_api import FakeDriver, Library
from masked_vit_kernels.bundle import bundled_files
from masked_vit_kernels.launch import KernelLaunch

BUILD = Path(os.environ["MVK_BUILD"])
BUNDLE = BUILD / "bundle"
ROOT = Path(__file__).parents[2]
HEADER = ROOT / "kernels/aot/include/masked_vit_kernels.h"
MANIFEST = json.loads((BUILD / "aot/manifest.json").read_text())
CUBINS = (BUILD / "aot/cubins.bin").read_bytes()
ARCHS = sorted({kernel["capability"] for kernel in MANIFEST["kernels"]})

FAKE = FakeDriver(BUILD / "tests/fake/libcuda.so.1")
LIBRARY = Library(BUILD / "libmasked_vit_kernels.so", HEADER)


def bundled_cubin(launch: KernelLaunch, capability: int) -> tuple[bytes, dict]:
    """The cubin and metadata that Triton would find in the bundle for this launch."""
    from cubins import Kernel
    from masked_vit_kernels.compile import specialize_launch

    kernel = Kernel(capability, specialize_launch(launch, capability), BUNDLE)
    assert bundled_files(BUNDLE, kernel.key, f"{kernel.symbol}.json"), (
        f"{kernel.symbol} with {launch.arguments} is not in the bundle"
    )
    return kernel.cubin, kernel.metadata
