"""A Triton driver without a GPU: launches go all the way to the driver's own launch function.

What runs is Triton's launch path, binding, hashing, cache lookup and, where that finds nothing,
compilation; loading the cubin and launching it do nothing.
"""

from __future__ import annotations

import types

from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class StubDriver:
    """Device number N is a GPU of compute capability N."""

    def __init__(self):
        self.device = 90
        self.utils = types.SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
            load_binary=lambda name, cubin, shared, device: (0, 0, 0, 0, 1024),
        )

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.device, 32)

    @staticmethod
    def launcher_cls(src, metadata):
        return lambda *arguments: None


def install_stub_driver() -> StubDriver:
    """Make it Triton's active driver for the rest of the process."""
    stub = StubDriver()
    driver.set_active(stub)
    return stub
