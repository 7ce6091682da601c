"""Source mutations: patch a copy of the op library and require that a check notices.

A module in `tests/mutations` holds a list MUTATIONS; `test_mutations.py` runs all of them in the
interpreter. The check gets freshly imported modules: those of the mutated package, and
`attention_checks`, `op_checks` and the like imported against it.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import masked_vit_kernels


@dataclass(frozen=True)
class Mutation:
    """Replace `old`, which must occur exactly once in the file, by `new`; `check` must then fail.

    `check(modules)` takes a mapping that imports on access: modules["masked_vit_kernels.packing"].
    """

    name: str
    file: str
    old: str
    new: str
    check: Callable


class _Modules:
    """Imports on access, from wherever sys.path points."""

    def __getitem__(self, name: str):
        return importlib.import_module(name)


def run_check(mutation: Mutation, folder: Path, *, mutated: bool) -> None:
    """Run the mutation's check against a copy of the package in `folder`, patched if `mutated`."""
    copy = folder / "masked_vit_kernels"
    shutil.copytree(
        Path(masked_vit_kernels.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__")
    )
    source = copy / mutation.file
    text = source.read_text()
    assert text.count(mutation.old) == 1, (
        f"{mutation.name}: {mutation.file} holds the text {text.count(mutation.old)} times"
    )
    if mutated:
        source.write_text(text.replace(mutation.old, mutation.new))

    saved_path, saved_modules = list(sys.path), dict(sys.modules)
    stale = [name for name in sys.modules if _depends_on_the_package(name)]
    try:
        for name in stale:
            del sys.modules[name]
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()
        mutation.check(_Modules())
    finally:
        sys.path[:] = saved_path
        for name in [name for name in sys.modules if _depends_on_the_package(name)]:
            del sys.modules[name]
        sys.modules.update({name: saved_modules[name] for name in stale})


def _depends_on_the_package(name: str) -> bool:
    return name.split(".")[0] in ("masked_vit_kernels", "ijepa") or name.endswith("_checks")
