"""Linear layers by the fastest matrix product that PyTorch carries for this processor.

PyTorch hands float32 products to MKL, which stays with AVX2 on AMD's processors:
0.12 TFLOP/s on one core of a Zen 5, where oneDNN's AVX-512 code reaches 0.26. In bfloat16 oneDNN
computes both, but `F.linear` writes the bias into the output first and `_linear_pointwise` adds it
on the way out. Everything else, GPUs first of all, takes `F.linear`.

    y = x W^T + b,    dx = dy W,    dW = dy^T x,    db = sum over tokens of dy
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements below which a weight gradient with fewer columns than rows is computed transposed:
# 1.6 times as fast at 96 to 288 on two cores of a Zen 5, and nothing gained beyond.
_SMALL_WEIGHT = 1 << 18


def _onednn_dtypes() -> frozenset[torch.dtype]:
    """Dtypes whose products oneDNN computes faster than what `F.linear` calls.

    A property of the processor and not of a timing: a resumed run has to take the same products.
    """
    if not (torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_supported()):
        return frozenset()
    dtypes = {torch.bfloat16} if torch.cpu._is_avx512_bf16_supported() else set()
    if _vendor() == "AuthenticAMD":
        dtypes.add(torch.float32)
    return frozenset(dtypes)


def _vendor() -> str:
    """The x86 processor's vendor string, "" where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    lines = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == "vendor_id"), "")


ONEDNN_DTYPES = _onednn_dtypes()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(T, K), (N, K), (N,) -> (T, N); the inputs may be strided."""
    if torch.compiler.is_compiling():
        return _opaque_product(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.custom_op("masked_vit_kernels::onednn_product", mutates_args=())
def _opaque_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Inductor's own lowering of `_linear_pointwise` takes constant weights alone."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@_opaque_product.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(grad, weight.t())
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(grad, x)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_x, grad_weight, grad_bias


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """dy (T, N), x (T, K) -> (N, K)."""
    if grad.dtype == torch.bfloat16:  # PyTorch's own product is oneDNN's too, and reads x as it is
        return grad.t() @ x
    if x.shape[1] < grad.shape[1] and x.shape[1] * grad.shape[1] <= _SMALL_WEIGHT:
        return _product(x.t(), grad.t()).t()
    return _product(grad.t(), x.t())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of (T, K) tokens, by oneDNN on processors where that is faster.

    Args:
        x: (T, K); under CPU autocast cast to its dtype, as weight and bias are.
        weight: (N, K) in x's dtype.
        bias: (N,) in x's dtype, or None.

    Returns:
        (T, N).

    Raises:
        RuntimeError: shapes or dtypes that do not fit, as `F.linear` does.
    """
    if x.device.type != "cpu" or x.ndim != 2:
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    # else F.linear's error
    fits = x.dtype == weight.dtype and x.shape[1:] == weight.shape[1:] != (0,)
    fits = fits and (bias is None or bias.shape == weight.shape[:1])
    if not fits or x.dtype not in ONEDNN_DTYPES or x.shape[0] == 0:
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)
