"""Says which packages the GPU run needs, or uses where they are, cannot be imported here.

python -m bench.packages
"""

import importlib
import sys

NEEDED = (
    "torch", "triton", "numpy", "PIL", "simplejpeg", "tyro", "typeguard",
    "docstring_parser", "rich", "safetensors",
    "pytest", "pytest_benchmark", "pytest_timeout", "hypothesis",
)  # fmt: skip
USED = {
    "matplotlib": "plots",
    "xdist": "GPU tests on all cores",
    "xformers": "a peer of attention",
    "flash_attn": "a peer of attention",
}


def why_not(name: str) -> str | None:
    """What importing it raises: of a dependency's name, where that is what lacks."""
    try:
        importlib.import_module(name)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


if __name__ == "__main__":
    missing = {name: reason for name in NEEDED if (reason := why_not(name))}
    for name, reason in missing.items():
        print(f"needed: {name}: {reason}")
    for name, use in USED.items():
        if reason := why_not(name):
            print(f"without {name} ({use}): {reason}")
    sys.exit(bool(missing))
