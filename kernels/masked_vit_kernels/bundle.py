"""Kernels compiled ahead of time, found by Triton where it would look for its own.

    cmake -B build && cmake --build build
    MASKED_VIT_KERNELS_CACHE=build/bundle ijepa pretrain vitb16 --data.path ~/photos

A bundle is a folder in the layout of Triton's cache: one folder a kernel, named by a hash of the
kernel's source, types, constexprs, hints and options, the architecture and Triton itself. A launch
whose kernel lies there compiles nothing; any other compiles into Triton's cache as ever, and the
bundle is only read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

VARIABLE = "MASKED_VIT_KERNELS_CACHE"
VERSION_FILE = "triton-version.txt"  # in a bundle, the Triton that compiled it


def use_bundle(folder: str | Path) -> None:
    """Let Triton look for compiled kernels in `folder` first, for the rest of the process.

    Raises:
        ValueError: no bundle lies there, or another version of Triton compiled it.
    """
    import triton  # here, so that the CPU path is imported where there is none
    from triton import knobs

    folder = Path(folder).resolve()
    version = folder / VERSION_FILE
    if not version.exists():
        raise ValueError(
            f"{VARIABLE} must name the bundle of an ahead-of-time build, such as build/bundle, got "
            f"{folder}"
        )
    compiled_by = version.read_text().strip()
    if compiled_by != triton.__version__:
        raise ValueError(
            f"the kernels in {folder} were compiled by Triton {compiled_by}, this is "
            f"{triton.__version__}: build them again, or unset {VARIABLE}"
        )
    knobs.cache.manager_class = _reading_first(folder, knobs.cache.manager_class)


def use_bundle_of_environment() -> None:
    """`use_bundle` of what MASKED_VIT_KERNELS_CACHE names, if it is set."""
    if os.environ.get(VARIABLE) and os.environ.get("TRITON_INTERPRET") != "1":
        use_bundle(os.environ[VARIABLE])


def bundled_files(folder: Path, key: str, metadata_name: str) -> dict[str, str] | None:
    """Paths of one kernel's files by name, None where the bundle does not hold it.

    The folder is listed, Triton's own index is not read: it holds absolute paths, and a bundle
    can be moved.
    """
    kernel = folder / key
    if not (kernel / metadata_name).exists():
        return None
    return {p.name: str(p) for p in kernel.iterdir() if not p.name.startswith(("__grp__", "tmp."))}


def _reading_first(folder: Path, base: Any) -> type:
    """A cache manager that asks the bundle before `base`, and never writes to it."""

    from triton.runtime.cache import FileCacheManager

    class BundleCacheManager(base or FileCacheManager):  # type: ignore[misc]
        def __init__(self, key: str, override: bool = False, dump: bool = False):
            super().__init__(key, override, dump)
            self._bundle_key = None if override or dump else key

        def get_group(self, filename: str) -> dict[str, str] | None:
            if self._bundle_key is not None:
                files = bundled_files(folder, self._bundle_key, filename)
                if files is not None:
                    return files
            return super().get_group(filename)

    return BundleCacheManager
