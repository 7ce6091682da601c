"""Compile the kernels of all cases into a bundle, each once, on all cores.

A bundle has the layout of Triton's cache (`masked_vit_kernels.bundle`): what has not changed since
the last build is found there and not compiled again.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import triton
from masked_vit_kernels.bundle import VERSION_FILE, bundled_files
from masked_vit_kernels.catalogue.case import Case
from masked_vit_kernels.compile import Specialized, specialize_launch
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.compiler import make_backend
from triton.runtime.cache import _base32, get_cache_key


@dataclass
class Kernel:
    """One kernel to compile, or compiled.

    Attributes:
        capability: 80, 90 or 100.
        specialized: arguments of `triton.compile`.
        budgets: keys of `audit.budgets.BUDGETS` that it must hold.
    """

    capability: int
    specialized: Specialized
    folder: Path
    budgets: set[str] = field(default_factory=set)

    @cached_property
    def key(self) -> str:
        """The name that Triton's cache gives to it."""
        src, target, options = self.specialized
        backend = make_backend(target)
        parsed = backend.parse_options(dict(options))
        environment = get_cache_invalidating_env_vars()
        key = get_cache_key(src, backend, parsed, env_vars=environment)
        return _base32(hashlib.sha256(key.encode()).hexdigest())

    @property
    def symbol(self) -> str:
        return self.specialized.src.name

    @property
    def files(self) -> dict[str, str] | None:
        """Paths by file name, None before it is compiled."""
        return bundled_files(self.folder, self.key, f"{self.symbol}.json")

    def _read(self, ending: str) -> bytes:
        if self.files is None:
            raise RuntimeError(f"{self.symbol} for sm_{self.capability} was not compiled")
        return Path(self.files[f"{self.symbol}.{ending}"]).read_bytes()

    @cached_property
    def metadata(self) -> dict:
        """What Triton says about the launch: num_warps, shared and so on."""
        return json.loads(self._read("json"))

    @cached_property
    def cubin(self) -> bytes:
        return self._read("cubin")


@dataclass(frozen=True)
class Entry:
    """A case of one capability with its kernels."""

    capability: int
    case: Case
    kernels: tuple[Kernel, ...]


def collect(cases: Iterable[Case], capability: int, folder: Path) -> list[Entry]:
    """The cases with their kernels, which equal launches share."""
    kernels: dict[str, Kernel] = {}
    entries = []
    for case in cases:
        chosen = []
        for launch, budget in zip(case.launches, case.budgets, strict=True):
            kernel = Kernel(capability, specialize_launch(launch, capability), folder)
            kernel = kernels.setdefault(kernel.key, kernel)
            kernel.budgets.add(budget)
            chosen.append(kernel)
        entries.append(Entry(capability, case, tuple(chosen)))
    return entries


def compile_missing(kernels: list[Kernel], folder: Path, jobs: int) -> int:
    """Compile what the bundle lacks, drop what it holds besides; the number compiled."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {kernel.key for kernel in kernels}
    for old in folder.iterdir():
        if old.is_dir() and old.name not in wanted:
            shutil.rmtree(old)
    (folder / VERSION_FILE).write_text(triton.__version__ + "\n")

    missing = [kernel for kernel in kernels if kernel.files is None]
    if missing:
        _compile(missing, jobs)
    return len(missing)


_work: list[Kernel] = []  # read by forked workers, which inherit it


def _compile(missing: list[Kernel], jobs: int) -> None:
    # Attention first: it takes longest, and the last seconds then go to many short kernels.
    _work[:] = sorted(missing, key=lambda kernel: "attention" not in kernel.symbol)
    progress = _Progress(len(_work))
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for error in pool.imap_unordered(_compile_one, range(len(_work))):
            if error:
                pool.terminate()
                sys.exit(error)
            progress.advance()
    progress.close()


def _compile_one(index: int) -> str | None:
    """Compile one kernel of `_work`; what went wrong, in words."""
    kernel = _work[index]
    try:
        triton.compile(*kernel.specialized)
    except Exception as error:
        return f"{kernel.symbol} for sm_{kernel.capability} does not compile: {error}"
    return None


class _Progress:
    """How many kernels are compiled and how long the rest will take, every few seconds."""

    def __init__(self, total: int):
        self.total, self.done = total, 0
        self.started = self.shown = time.monotonic()

    def advance(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.shown >= 5.0:
            self.shown = now
            elapsed = now - self.started
            left = elapsed / self.done * (self.total - self.done)
            print(
                f"  {self.done} of {self.total} kernels, {elapsed:.0f} s, about {left:.0f} s left",
                flush=True,
            )

    def close(self) -> None:
        seconds = time.monotonic() - self.started
        print(f"  {self.total} kernels compiled in {seconds:.0f} s", flush=True)
