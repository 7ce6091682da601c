"""Mean and deviation of each feature over the patches of an image, for instance-normalised targets.

    mean[b, d] = sum over n of features[b, n, d] / N
    rstd[b, d] = 1 / sqrt(sum over n of (features[b, n, d] - mean[b, d])^2 / N + eps)    eps = 1e-5

One program takes some columns of one image, goes over its patches twice, the second time from the
cache, and adds in a fixed order in float32. Bytes moved: every feature once, and 8 a feature of an
image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from masked_vit_kernels.kernel_language import tl, triton
from masked_vit_kernels.launch import KernelLaunch, round_up_to_power_of_two
from masked_vit_kernels.tokens import cpu

# ----------------------------------------------------------------------------- kernel


@triton.jit(do_not_specialize=["num_patches"])
def _image_statistics_kernel(
    features_ptr,  # (B, N, D)
    out_ptr,  # (2, B, D) float32: mean, 1 / deviation
    num_patches,
    stride_fb,
    stride_fn,
    EPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_width = columns < D
    first = features_ptr + image * stride_fb + columns[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for start in range(0, num_patches, BLOCK_N):
        patches = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        present = (patches < num_patches)[:, None] & in_width[None, :]
        total += tl.load(  # [BLOCK_N, BLOCK_D]
            first + patches[:, None] * stride_fn, mask=present, other=0
        ).to(tl.float32)
    mean = tl.sum(total, axis=0) / num_patches  # [BLOCK_D]
    squares = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for start in range(0, num_patches, BLOCK_N):
        patches = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        present = (patches < num_patches)[:, None] & in_width[None, :]
        feature = tl.load(  # [BLOCK_N, BLOCK_D]
            first + patches[:, None] * stride_fn, mask=present, other=0
        ).to(tl.float32)
        centred = tl.where(present, feature - mean[None, :], 0.0)
        squares += centred * centred
    variance = tl.sum(squares, axis=0) / num_patches  # [BLOCK_D]
    tl.store(out_ptr + image * D + columns, mean, mask=in_width)
    tl.store(
        out_ptr + (tl.num_programs(0) + image) * D + columns,
        1.0 / tl.sqrt_rn(variance + EPS),
        mask=in_width,
    )


# ----------------------------------------------------------------------------- launch and op


def image_statistics_launch(features: Tensor, out: Tensor) -> KernelLaunch:
    """features (B, N, D) with unit column stride -> out (2, B, D)."""
    images, patches, width = features.shape
    block_d = min(64, round_up_to_power_of_two(width))
    return KernelLaunch(
        kernel=_image_statistics_kernel,
        grid=(images, triton.cdiv(width, block_d)),
        arguments={
            "features_ptr": features,
            "out_ptr": out,
            "num_patches": patches,
            "stride_fb": features.stride(0),
            "stride_fn": features.stride(1),
            "EPS": cpu.TARGET_NORM_EPS,
            "D": width,
            "BLOCK_N": max(1, 2048 // block_d),
            "BLOCK_D": block_d,
        },
    )


@torch.library.custom_op("masked_vit_kernels::image_statistics", mutates_args=())
def image_statistics(features: Tensor) -> Tensor:
    """(B, N, D) -> (2, B, D) float32: mean and reciprocal deviation, biased, over the N patches."""
    images, _, width = features.shape
    out = features.new_empty(2, images, width, dtype=torch.float32)
    if features.stride(2) != 1:
        features = features.contiguous()
    image_statistics_launch(features, out).run()
    return out


@image_statistics.register_fake
def _(features):
    images, _, width = features.shape
    return features.new_empty(2, images, width, dtype=torch.float32)
