"""Linear layers whose products run in float8 (e4m3), for networks that need no gradients.

    s_x[t] = max |x[t]| / 448,  x8 = round(x / s_x)         a row of tokens at a time
    s_w[n] = max |w[n]| / 448,  w8 = round(w / s_w)         a row of weights (an output) at a time
    y = (x8 w8^T) * s_x s_w^T + b                           summed in float32, returned in bfloat16

e4m3 reaches to 448 and keeps 3 bits behind the leading one: every entry is off by at most 2^-4 of
itself, or by 2^-10 of its scale where it is tiny. Products run at twice the rate of bfloat16 on
Hopper, Ada and Blackwell. On a GPU the product is `torch._scaled_mm`; the CPU multiplies the
same rounded numbers in float32.

Rows of weights change at every optimiser step: `AdamWEMA.add_float8_copies` keeps them.
Quantising activations is plain PyTorch, so that compilers fuse it into what computes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from masked_vit_kernels.checks import check_dtype, check_same_device, check_shape

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
SMALLEST_MAXIMUM = 1e-30  # of a row, so that zeros have a scale
MULTIPLE = 16  # of both sizes of a weight, as the GPU's products want them
FIRST_CAPABILITY = 89  # Ada


@dataclass(frozen=True)
class Float8Rows:
    """A matrix in e4m3, each row with its own scale.

    Attributes:
        values: (N, K) float8_e4m3fn, contiguous.
        scale: (N, 1) float32; `values * scale` is the matrix.
    """

    values: Tensor
    scale: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Float8Rows:
        """`x` (N, K), rounded."""
        check_shape("x", x, (None, None), "(N, K)")
        check_dtype("x", x)
        maximum = x.abs().amax(1, keepdim=True).float().clamp(min=SMALLEST_MAXIMUM)
        values = (x.float() * (LARGEST / maximum)).clamp(-LARGEST, LARGEST)
        return cls(values.to(FLOAT8), maximum / LARGEST)

    @classmethod
    def empty_like(cls, x: Tensor) -> Float8Rows:
        """Memory for a copy of `x` (N, K).

        Raises:
            ValueError: sizes that are no multiples of 16, or a GPU without float8 products.
        """
        check_shape("x", x, (None, None), "(N, K)")
        if x.shape[0] % MULTIPLE or x.shape[1] % MULTIPLE:
            raise ValueError(
                f"float8 products need weights whose sizes are multiples of {MULTIPLE}, "
                f"got {tuple(x.shape)}"
            )
        check_device(x.device)
        values = torch.empty(x.shape, dtype=FLOAT8, device=x.device)
        return cls(values, torch.empty(x.shape[0], 1, device=x.device))

    def __getitem__(self, rows: slice) -> Float8Rows:
        """Some of the rows, without a copy."""
        return Float8Rows(self.values[rows], self.scale[rows])

    def copy_(self, x: Tensor) -> None:
        """Overwrite with `x` (N, K), rounded."""
        rounded = Float8Rows.of(x)
        self.values.copy_(rounded.values)
        self.scale.copy_(rounded.scale)

    def dequantized(self) -> Tensor:
        """(N, K) float32."""
        return self.values.float() * self.scale


def check_device(device: torch.device) -> None:
    """Raise ValueError where `device` is a GPU that multiplies no float8."""
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < FIRST_CAPABILITY:
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) multiplies "
            "no float8, which takes 8.9 (Ada, Hopper, Blackwell): stay with bfloat16"
        )


def float8_linear(x: Tensor, weight: Float8Rows, bias: Tensor | None = None) -> Tensor:
    """x w^T + b with both factors rounded to e4m3, row by row.

    Args:
        x: (T, K) float32, bfloat16 or float16; not differentiable.
        weight: N rows of K.
        bias: (N,), taken in bfloat16.

    Returns:
        (T, N) bfloat16.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an input that wants gradients.
    """
    check_shape("x", x, (None, weight.values.shape[1]), f"(T, {weight.values.shape[1]})")
    check_same_device("x", x, weight=weight.values, bias=bias)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError("float8_linear has no gradients: call it under torch.no_grad()")
    rows = Float8Rows.of(x)
    bias = None if bias is None else bias.to(torch.bfloat16)
    if x.device.type == "cuda":
        return torch._scaled_mm(
            rows.values, weight.values.t(), scale_a=rows.scale, scale_b=weight.scale.t(),
            bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip
    with torch.autocast(x.device.type, enabled=False):
        product = F.linear(rows.values.float(), weight.values.float())
    product = product * rows.scale * weight.scale.t()
    return (product if bias is None else product + bias).to(torch.bfloat16)
