"""Kernels of the patch embedding and how they are launched; `patch_embed.py` has the maths.

Rows of 16 or 32 uint8 pixels are read 16 bytes at a time; of 14 pixels, 2 bytes: the start of such
a row is no multiple of more. The image's strides are constants of the kernel, so that the compiler
knows what they are multiples of.

A clip (B, C, F, Hi, Wi) is an image with a time axis, its patches are tubelets of PT frames. PT is
0 for images, whose kernels know nothing of time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from masked_vit_kernels.kernel_language import tl, triton
from masked_vit_kernels.launch import KernelLaunch
from masked_vit_kernels.tokens.rows import (
    ROW_COUNTS,
    RowIndex,
    column_block,
    locate_rows,
    tile_rows,
)

Patch = Sequence[int]  # (ph, pw), or (pt, ph, pw) of clips

IMAGE_DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)

# ----------------------------------------------------------------------------- kernels


@triton.jit
def _patch_origins(
    images, tokens, STRIDE_B, STRIDE_T, STRIDE_H, STRIDE_W,
    PT: tl.constexpr, PH, PW, GRID_HEIGHT, GRID_WIDTH: tl.constexpr,
):  # fmt: skip
    """Offset of each patch's first pixel, int64."""
    patch_rows = tokens // GRID_WIDTH
    patch_columns = tokens % GRID_WIDTH
    if PT > 0:
        images = images * STRIDE_B + (patch_rows // GRID_HEIGHT) * (PT * STRIDE_T)
        patch_rows = patch_rows % GRID_HEIGHT
        return images + patch_rows * (PH * STRIDE_H) + patch_columns * (PW * STRIDE_W)
    return images * STRIDE_B + patch_rows * (PH * STRIDE_H) + patch_columns * (PW * STRIDE_W)


@triton.jit
def _pixel_offsets(
    columns, STRIDE_C, STRIDE_T, STRIDE_H, STRIDE_W, PT: tl.constexpr, PH, PW: tl.constexpr
):
    """Offset of pixel k = (channel, frame, row, column) of a patch from the patch's first pixel."""
    # One division at a time: the compiler then knows that PW pixels in a row are contiguous.
    pixel_rows = columns // PW  # of all channels
    channels = pixel_rows // PH
    if PT > 0:  # so far they are (channel, frame)
        frames = (channels // PT) * STRIDE_C + (channels % PT) * STRIDE_T
        return frames + (pixel_rows % PH) * STRIDE_H + (columns % PW) * STRIDE_W
    return channels * STRIDE_C + (pixel_rows % PH) * STRIDE_H + (columns % PW) * STRIDE_W


@triton.jit
def _pixel_scale_and_shift(channels, in_width, mean_ptr, std_ptr, PIXEL_SCALE: tl.constexpr):
    """What a pixel is multiplied by and then reduced by: x * scale - shift."""
    scale = tl.full(channels.shape, PIXEL_SCALE, tl.float32)
    shift = tl.zeros(channels.shape, tl.float32)
    if mean_ptr is not None:
        shift = tl.load(mean_ptr + channels, mask=in_width, other=0).to(tl.float32)
    if std_ptr is not None:
        std = tl.load(std_ptr + channels, mask=in_width, other=1).to(tl.float32)
        scale = scale / std
        shift = shift / std
    return scale, shift


@triton.jit(do_not_specialize=ROW_COUNTS)
def _patch_rows_kernel(
    images_ptr,  # (B, C, Hi, Wi) or (B, C, F, Hi, Wi)
    mean_ptr,  # (C,) or None
    std_ptr,  # (C,) or None
    indices_ptr,  # (R,) or None
    sequence_ids_ptr,  # (R,) or None
    out_ptr,  # (R, K')
    num_rows,
    num_tokens,
    rows_per_image,
    sequences_per_image,
    STRIDE_B: tl.constexpr,
    STRIDE_C: tl.constexpr,
    STRIDE_T: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    GRID_HEIGHT: tl.constexpr,
    GRID_WIDTH: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    PIXEL_SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_range = rows < num_rows
    in_width = columns < K
    images, tokens, taken = locate_rows(
        rows, in_range, indices_ptr, sequence_ids_ptr,
        num_tokens, rows_per_image, sequences_per_image,
    )  # fmt: skip
    origins = _patch_origins(
        images, tokens, STRIDE_B, STRIDE_T, STRIDE_H, STRIDE_W, PT, PH, PW, GRID_HEIGHT, GRID_WIDTH
    )
    offsets = _pixel_offsets(columns, STRIDE_C, STRIDE_T, STRIDE_H, STRIDE_W, PT, PH, PW)
    CHANNEL: tl.constexpr = (PT * PH * PW) if PT > 0 else (PH * PW)  # pixels of one, in a patch
    scale, shift = _pixel_scale_and_shift(
        columns // CHANNEL, in_width, mean_ptr, std_ptr, PIXEL_SCALE
    )
    visible = taken[:, None] & in_width[None, :]
    pixels = tl.load(  # [BLOCK_ROWS, BLOCK_K]
        images_ptr + origins[:, None] + offsets[None, :], mask=visible, other=0
    ).to(tl.float32)
    values = tl.where(visible, pixels * scale[None, :] - shift[None, :], 0.0)
    tl.store(
        out_ptr + rows[:, None] * K_PADDED + columns[None, :],
        values.to(out_ptr.dtype.element_ty),
        mask=in_range[:, None] & (columns < K_PADDED)[None, :],
    )


@triton.jit(do_not_specialize=ROW_COUNTS)
def _add_position_kernel(
    x_ptr,  # (R, D)
    bias_ptr,  # (D,) or None
    position_ptr,  # (N, D) or None
    indices_ptr,  # (R,) or None
    sequence_ids_ptr,  # (R,) or None
    out_ptr,  # (R, D)
    num_rows,
    num_tokens,
    rows_per_image,
    sequences_per_image,
    stride_xr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_range = rows < num_rows
    in_width = columns < D
    _, tokens, taken = locate_rows(
        rows, in_range, indices_ptr, sequence_ids_ptr,
        num_tokens, rows_per_image, sequences_per_image,
    )  # fmt: skip
    present = taken[:, None] & in_width[None, :]
    values = tl.load(  # [BLOCK_ROWS, BLOCK_D]
        x_ptr + rows[:, None] * stride_xr + columns[None, :], mask=present, other=0
    ).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=in_width, other=0).to(tl.float32)
        values += tl.where(taken[:, None], bias[None, :], 0.0)
    if position_ptr is not None:
        values += tl.load(
            position_ptr + tokens[:, None] * D + columns[None, :], mask=present, other=0
        ).to(tl.float32)
    tl.store(
        out_ptr + rows[:, None] * D + columns[None, :],
        values.to(out_ptr.dtype.element_ty),
        mask=in_range[:, None] & in_width[None, :],
    )


@triton.jit(do_not_specialize=[*ROW_COUNTS, "rows_per_chunk"])
def _add_position_backward_kernel(
    grad_ptr,  # (R, D)
    indices_ptr,  # (R,) or None
    sequence_ids_ptr,  # (R,) or None
    grad_x_ptr,  # (R, D): the gradient, zero on padding
    partial_ptr,  # (chunks, D) float32: its sum over the rows of each chunk
    num_rows,
    num_tokens,
    rows_per_image,
    sequences_per_image,
    rows_per_chunk,
    stride_gr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_width = columns < D
    total = tl.zeros((BLOCK_ROWS, BLOCK_D), dtype=tl.float32)  # [BLOCK_ROWS, BLOCK_D]
    for step in range(0, rows_per_chunk, BLOCK_ROWS):
        rows = chunk * rows_per_chunk + step + tl.arange(0, BLOCK_ROWS)
        in_range = rows < num_rows
        _, _, taken = locate_rows(
            rows, in_range, indices_ptr, sequence_ids_ptr,
            num_tokens, rows_per_image, sequences_per_image,
        )  # fmt: skip
        grad = tl.load(  # [BLOCK_ROWS, BLOCK_D]
            grad_ptr + rows[:, None] * stride_gr + columns[None, :],
            mask=taken[:, None] & in_width[None, :],
            other=0,
        )
        tl.store(
            grad_x_ptr + rows[:, None] * D + columns[None, :],
            grad,
            mask=in_range[:, None] & in_width[None, :],
        )
        total += grad.to(tl.float32)
    tl.store(partial_ptr + chunk * D + columns, tl.sum(total, axis=0), mask=in_width)


@triton.jit(do_not_specialize=ROW_COUNTS)
def _fused_patch_embed_kernel(
    images_ptr,  # (B, C, Hi, Wi) or (B, C, F, Hi, Wi)
    mean_ptr,  # (C,) or None
    std_ptr,  # (C,) or None
    weight_ptr,  # (D, K')
    bias_ptr,  # (D,) or None
    position_ptr,  # (N, D) or None
    indices_ptr,  # (R,) or None
    sequence_ids_ptr,  # (R,) or None
    out_ptr,  # (R, D)
    num_rows,
    num_tokens,
    rows_per_image,
    sequences_per_image,
    STRIDE_B: tl.constexpr,
    STRIDE_C: tl.constexpr,
    STRIDE_T: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    GRID_HEIGHT: tl.constexpr,
    GRID_WIDTH: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    D: tl.constexpr,
    PIXEL_SCALE: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Columns vary fastest: the programs that share pixels run together.
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = tl.program_id(1).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_range = rows < num_rows
    in_width = columns < D
    images, tokens, taken = locate_rows(
        rows, in_range, indices_ptr, sequence_ids_ptr,
        num_tokens, rows_per_image, sequences_per_image,
    )  # fmt: skip
    origins = _patch_origins(
        images, tokens, STRIDE_B, STRIDE_T, STRIDE_H, STRIDE_W, PT, PH, PW, GRID_HEIGHT, GRID_WIDTH
    )

    CHANNEL: tl.constexpr = (PT * PH * PW) if PT > 0 else (PH * PW)  # pixels of one, in a patch
    total = tl.zeros((BLOCK_ROWS, BLOCK_D), dtype=tl.float32)  # [BLOCK_ROWS, BLOCK_D]
    for start in range(0, K_PADDED, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        offsets = _pixel_offsets(k, STRIDE_C, STRIDE_T, STRIDE_H, STRIDE_W, PT, PH, PW)
        scale, shift = _pixel_scale_and_shift(k // CHANNEL, k < K, mean_ptr, std_ptr, PIXEL_SCALE)
        visible = taken[:, None] & (k < K)[None, :]
        pixels = tl.load(  # [BLOCK_ROWS, BLOCK_K]
            images_ptr + origins[:, None] + offsets[None, :], mask=visible, other=0
        ).to(tl.float32)
        pixels = tl.where(visible, pixels * scale[None, :] - shift[None, :], 0.0)
        weight = tl.load(  # [BLOCK_K, BLOCK_D]
            weight_ptr + columns[None, :] * K_PADDED + k[:, None],
            mask=in_width[None, :] & (k < K_PADDED)[:, None],
            other=0,
        )
        # [BLOCK_ROWS, BLOCK_K] @ [BLOCK_K, BLOCK_D]
        total = tl.dot(
            pixels.to(weight_ptr.dtype.element_ty), weight, total, input_precision=DOT_PRECISION
        )

    present = taken[:, None] & in_width[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=in_width, other=0).to(tl.float32)
        total += tl.where(taken[:, None], bias[None, :], 0.0)
    if position_ptr is not None:
        total += tl.load(
            position_ptr + tokens[:, None] * D + columns[None, :], mask=present, other=0
        ).to(tl.float32)
    tl.store(
        out_ptr + rows[:, None] * D + columns[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=in_range[:, None] & in_width[None, :],
    )


# ----------------------------------------------------------------------------- launches


def _image_arguments(
    images: Tensor, mean: Tensor | None, std: Tensor | None, patch: Patch
) -> dict[str, object]:
    """Kernel parameters of the image. Its strides are constants: they decide how wide loads are."""
    *tubelet, ph, pw = patch
    stride_b, stride_c, *stride_t, stride_h, stride_w = images.stride()
    return {
        "images_ptr": images,
        "mean_ptr": mean,
        "std_ptr": std,
        "STRIDE_B": stride_b,
        "STRIDE_C": stride_c,
        "STRIDE_T": stride_t[0] if stride_t else 0,
        "STRIDE_H": stride_h,
        "STRIDE_W": stride_w,
        "PT": tubelet[0] if tubelet else 0,
        "PH": ph,
        "PW": pw,
        "GRID_HEIGHT": images.shape[-2] // ph if tubelet else 0,
        "GRID_WIDTH": images.shape[-1] // pw,
        "K": images.shape[1] * math.prod(patch),
        "PIXEL_SCALE": 1.0 / 255.0 if images.dtype == torch.uint8 else 1.0,
    }


def patch_grid(images: Tensor, patch: Patch) -> tuple[int, ...]:
    """Patches along each axis that is cut."""
    return tuple(size // side for size, side in zip(images.shape[2:], patch, strict=True))


def num_patches(images: Tensor, patch: Patch) -> int:
    """N."""
    return math.prod(patch_grid(images, patch))


def padded_pixels(images: Tensor, patch: Patch) -> int:
    """K': the pixels of a patch, rounded up to a multiple of 16."""
    return -(-images.shape[1] * math.prod(patch) // 16) * 16


def patch_rows_launch(
    images: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    index: RowIndex,
    patch: Patch,
    out: Tensor,
) -> KernelLaunch:
    """images (B, C, Hi, Wi) or clips (B, C, F, Hi, Wi), mean and std (C,) -> out (R, K')."""
    num_rows, padded = out.shape
    block_k = min(triton.next_power_of_2(padded), 128)
    block_rows = tile_rows(out, block_k)
    return KernelLaunch(
        kernel=_patch_rows_kernel,
        grid=(triton.cdiv(num_rows, block_rows), triton.cdiv(padded, block_k)),
        arguments={
            **index.arguments(num_patches(images, patch)),
            **_image_arguments(images, mean, std, patch),
            "out_ptr": out,
            "num_rows": num_rows,
            "K_PADDED": padded,
            "BLOCK_ROWS": block_rows,
            "BLOCK_K": block_k,
        },
    )


def add_position_launch(
    x: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    index: RowIndex,
    num_tokens: int,
    out: Tensor,
) -> KernelLaunch:
    """x (R, D) with unit column stride, bias (D,), position (N, D) contiguous -> out (R, D)."""
    num_rows, width = out.shape
    block_d = column_block(width)
    block_rows = tile_rows(out, block_d)
    return KernelLaunch(
        kernel=_add_position_kernel,
        grid=(triton.cdiv(num_rows, block_rows), triton.cdiv(width, block_d)),
        arguments={
            **index.arguments(num_tokens),
            "x_ptr": x,
            "bias_ptr": bias,
            "position_ptr": position,
            "out_ptr": out,
            "num_rows": num_rows,
            "stride_xr": x.stride(0),
            "D": width,
            "BLOCK_ROWS": block_rows,
            "BLOCK_D": block_d,
        },
    )


def add_position_backward_launch(
    grad: Tensor, index: RowIndex, num_tokens: int, grad_x: Tensor, partial: Tensor
) -> KernelLaunch:
    """grad (R, D) with unit column stride -> grad_x (R, D), partial sums (chunks, D)."""
    num_rows, width = grad.shape
    chunks = partial.shape[0]
    block_d = column_block(width)
    block_rows = tile_rows(grad, block_d)
    return KernelLaunch(
        kernel=_add_position_backward_kernel,
        grid=(chunks, triton.cdiv(width, block_d)),
        arguments={
            **index.arguments(num_tokens),
            "grad_ptr": grad,
            "grad_x_ptr": grad_x,
            "partial_ptr": partial,
            "num_rows": num_rows,
            "rows_per_chunk": triton.cdiv(triton.cdiv(num_rows, chunks), block_rows) * block_rows,
            "stride_gr": grad.stride(0),
            "D": width,
            "BLOCK_ROWS": block_rows,
            "BLOCK_D": block_d,
        },
    )


def fused_patch_embed_launch(
    images: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    index: RowIndex,
    patch: Patch,
    out: Tensor,
    capability: int,
) -> KernelLaunch:
    """images (B, C, Hi, Wi), weight (D, K'), bias (D,), position (N, D) -> out (R, D)."""
    num_rows, width = out.shape
    full_precision = weight.dtype == torch.float32
    block_rows, block_d, block_k = (64, 64, 32) if full_precision else (128, 128, 64)
    if capability == 80:  # its matrix instruction reads both operands from registers
        block_k = 32
    return KernelLaunch(
        kernel=_fused_patch_embed_kernel,
        grid=(triton.cdiv(width, block_d), triton.cdiv(num_rows, block_rows)),
        arguments={
            **index.arguments(num_patches(images, patch)),
            **_image_arguments(images, mean, std, patch),
            "weight_ptr": weight,
            "bias_ptr": bias,
            "position_ptr": position,
            "out_ptr": out,
            "num_rows": num_rows,
            "K_PADDED": weight.shape[1],
            "D": width,
            "DOT_PRECISION": "tf32x3" if full_precision else "tf32",
            "BLOCK_ROWS": block_rows,
            "BLOCK_K": block_k,
            "BLOCK_D": block_d,
        },
        num_warps=4 if full_precision else 8,
        num_stages=2 if capability == 80 else 3,
    )
