"""How long the launches of a first step take to find or compile their kernels.

    python tests/aot/first_step.py --bundle build/bundle [--recipe vitb16] [--arch 90]

Two fresh processes run Triton's launch path for every launch of a training step, once with an empty
cache and once with the bundle; only the driver is a stub. On a GPU, loading the cubins and the step
itself come on top, the same for both.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time


def main() -> None:
    parser = argparse.ArgumentParser(description="time to first step, as far as kernels go")
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--recipe", default="vitb16")
    parser.add_argument("--precision", default="bf16-params")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _time_launches(options)
        return
    for name, bundle in (("empty cache", ""), ("bundle", options.bundle)):
        with tempfile.TemporaryDirectory() as cache:
            environment = os.environ | {
                "TRITON_CACHE_DIR": cache,
                "MASKED_VIT_KERNELS_CACHE": bundle,
            }
            command = [sys.executable, __file__, *sys.argv[1:], "--child"]
            result = subprocess.run(
                command, env=environment, check=True, capture_output=True, text=True
            )
            print(f"{name:12} {result.stdout.strip()}")


def _time_launches(options: argparse.Namespace) -> None:
    from step_launches import step_launches
    from stub_gpu import install_stub_driver
    from triton.runtime.cache import triton_key

    launches = step_launches(options.recipe, options.precision, options.arch)
    install_stub_driver().device = options.arch
    started = time.perf_counter()
    triton_key()  # Triton hashes itself once a process, for either
    hashed = time.perf_counter()
    for launch in launches:
        launch._launch()
    seconds = time.perf_counter() - hashed
    print(
        f"{len(launches)} launches: {seconds:.2f} s, after {hashed - started:.2f} s in which "
        "Triton hashes itself"
    )


if __name__ == "__main__":
    main()
