"""Which versions run here: those that a result depends on, and all that are installed."""

from __future__ import annotations

import importlib.util
import platform
from importlib import metadata

import numpy as np
import torch

_PACKAGES = ("torch", "triton", "numpy", "pillow", "simplejpeg", "safetensors", "tyro", "rich")
_OPTIONAL = {
    "matplotlib": "curves.png",
    "tensorboard": "train.tensorboard",
}


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


def installed_versions() -> dict[str, str]:
    """Package to version, the optional ones with what they are for."""
    found = {"ijepa": _version("ijepa")} | {name: _version(name) for name in _PACKAGES}
    found["CUDA of torch"] = torch.version.cuda or "none"
    for name, use in _OPTIONAL.items():
        there = importlib.util.find_spec(name) is not None
        found[name] = _version(name) if there else f"not installed (only for {use})"
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
