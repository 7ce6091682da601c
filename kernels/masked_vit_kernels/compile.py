"""From a launch to the kernel it would run on a GPU, on a machine without one.

The arguments are bound as Triton's launcher binds them (types, constexprs, divisibility), so that
what is compiled here is what a launch on such a GPU compiles.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from masked_vit_kernels.launch import KernelLaunch


class Specialized(NamedTuple):
    """What Triton's launcher would hand to its compiler: arguments of `triton.compile`."""

    src: ASTSource
    target: GPUTarget
    options: dict[str, object]


def specialize_launch(launch: KernelLaunch, capability: int) -> Specialized:
    """Bind the arguments as `launch.run` would on a GPU of `capability` (80, 90 or 100)."""
    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        raise RuntimeError("nothing is compiled under TRITON_INTERPRET=1")
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(**launch.arguments)
    parsed, signature, constexprs, attributes = kernel._pack_args(
        backend, dict(launch.options), bound, specialization, None
    )
    source = ASTSource(kernel, signature, constexprs, attributes)
    return Specialized(source, target, parsed.__dict__)


def compile_launch(launch: KernelLaunch, capability: int) -> CompiledKernel:
    """Compile `launch` for `capability` (80, 90 or 100) as its `run` would on such a GPU."""
    return triton.compile(*specialize_launch(launch, capability))
