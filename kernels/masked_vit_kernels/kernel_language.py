"""Triton and its language, or what stands in for them where it is not installed.

There is no Triton for macOS, and for Windows only from elsewhere: the CPU path needs none. Kernels
are then still defined, as objects that raise when they are launched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["tl", "triton"]


class AbsentKernel:
    """A kernel that cannot be launched here."""

    def __init__(self, function: Callable):
        self.__name__ = function.__name__

    def __getitem__(self, grid: object) -> None:
        raise RuntimeError(
            f"the kernel {self.__name__} needs Triton, which is not installed: pip install triton "
            "(Linux), or give the op CPU tensors"
        )


class AbsentModule:
    """Any name of `triton` or `triton.language`; what the modules of this library do with them at
    import is to decorate kernels and to name types."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, name: str) -> AbsentModule:
        if name.startswith("__"):
            raise AttributeError(name)
        return AbsentModule(f"{self._name}.{name}")

    def __call__(self, *values: object) -> AbsentModule:
        return self

    def jit(self, function: Callable | None = None, **options: object) -> Any:
        """`triton.jit`, with and without options."""
        return AbsentKernel if function is None else AbsentKernel(function)

    def __repr__(self) -> str:
        return self._name


try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    triton = AbsentModule("triton")  # type: ignore[assignment]
    tl = AbsentModule("triton.language")  # type: ignore[assignment]
