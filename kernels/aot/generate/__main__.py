"""Build the tables and cubins of the C library: the one script that CMake calls.

    python kernels/aot/generate --archs 80 90 100 --out build/aot --bundle build/bundle
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# The kernels of this very checkout, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# Before Triton is imported: only cubins are kept, and in the bundle alone.
os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
os.environ.pop("MASKED_VIT_KERNELS_CACHE", None)
os.environ.pop("TRITON_INTERPRET", None)


def main() -> None:
    parser = argparse.ArgumentParser(description="compile the kernels of the C library")
    parser.add_argument("--archs", type=int, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the generated files")
    parser.add_argument("--bundle", type=Path, required=True, help="folder of the compiled kernels")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    os.environ["TRITON_CACHE_DIR"] = str(options.bundle.resolve())

    from masked_vit_kernels.launch import CAPABILITIES

    unknown = sorted(set(options.archs) - set(CAPABILITIES))
    if unknown:
        known = ", ".join(map(str, CAPABILITIES))
        sys.exit(f"no launch tables for {unknown}: MVK_ARCHS takes {known}")

    import tables
    from cubins import collect, compile_missing
    from masked_vit_kernels.catalogue import library_cases

    entries = [
        entry
        for capability in sorted(set(options.archs))
        for entry in collect(library_cases(capability), capability, options.bundle.resolve())
    ]
    kernels = list({id(kernel): kernel for entry in entries for kernel in entry.kernels}.values())
    print(f"  {len(entries)} cases, {len(kernels)} kernels", flush=True)
    compile_missing(kernels, options.bundle.resolve(), options.jobs)
    options.out.mkdir(parents=True, exist_ok=True)
    tables.write(entries, options.out.resolve())
    size = sum(len(kernel.cubin) for kernel in kernels) / 2**20
    packed = (options.out / "cubins.bin").stat().st_size / 2**20
    print(f"  {len(kernels)} cubins, {size:.1f} MiB, {packed:.1f} MiB compressed")


if __name__ == "__main__":
    main()
