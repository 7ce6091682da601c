"""How the ops launch their kernels: one description that runs, interprets and audits alike.

An op builds a `KernelLaunch` from tensors and calls `run`. The compile audit builds the same launch
from tensors on the `meta` device and compiles what a GPU would have been asked to run: constexprs,
types and divisibility hints cannot drift apart. Under `TRITON_INTERPRET=1` the same launch runs on
CPU tensors.

Alignment: Triton 3.6 learns that an integer argument is a multiple of 16 and of nothing smaller,
and `tl.multiple_of` on a kernel argument is lost. A stride that is a multiple of 8 is made a
constexpr, or passed divided by 8 and multiplied in the kernel; else every load is 2 bytes wide.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from masked_vit_kernels.bundle import use_bundle_of_environment
from masked_vit_kernels.kernel_language import triton

# Triton decides at import whether kernels are interpreted.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Compute capabilities the launch tables know, as major * 10 + minor.
CAPABILITIES = (80, 90, 100)

# Bytes of shared memory one program may use.
SHARED_MEMORY_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class KernelLaunch:
    """One kernel, its grid and every one of its parameters by name.

    Attributes:
        kernel: a `triton.jit` function.
        grid: programs along each axis; a launch with a zero in it does nothing.
        arguments: tensors, numbers and constexprs by parameter name, in any order.
        num_warps: warps a program.
        num_stages: depth of Triton's software pipeline.
        max_registers: a cap per thread that ptxas must keep, so that more programs share a
            multiprocessor; None leaves it the choice.
    """

    kernel: triton.runtime.KernelInterface
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Triton's compile options."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}

    def run(self) -> None:
        """Launch on the device of the tensors, whichever device is current."""
        if 0 in self.grid:
            return
        device = next(v.device for v in self.arguments.values() if isinstance(v, Tensor))
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._launch()
        else:
            self._launch()

    def _launch(self) -> None:
        _use_bundle_once()
        self.kernel[self.grid](**self.arguments, **self.options)


_use_bundle_once = functools.cache(use_bundle_of_environment)


def runs_kernels(device: torch.device) -> bool:
    """Whether ops on tensors of `device` run their Triton kernels: on the CPU if interpreted alone.

    No op answers this for itself, and none falls back: where kernels run, they run or raise.
    """
    return _INTERPRETED or device.type != "cpu"


@functools.cache
def _device_capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor


def table_capability(device: torch.device) -> int:
    """The entry of the launch tables that serves `device`: 80, 90 or 100.

    Hopper and datacenter Blackwell have their own; everything else runs Ampere's. Without a CUDA
    device (the interpreter, `meta` tensors) it is 90.
    """
    if device.type != "cuda":
        return 90
    index = torch.cuda.current_device() if device.index is None else device.index
    major = _device_capability(index) // 10
    return {9: 90, 10: 100}.get(major, 80)


def round_up_to_power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`; 1 for n < 1."""
    return 1 << max(n - 1, 0).bit_length()
