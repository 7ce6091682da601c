"""Embed only the visible patches, straight from the image.

    token[r] = W @ pixels(image(r), patch(r)) + bias + position[patch(r)]        zero on padding
    pixels   = (x / 255 - mean) / std for uint8 images, patches in raster order, (C, ph, pw) each

Two steps by default. A gather-and-normalise kernel writes patch rows (R, K') in the compute dtype,
K = C * ph * pw padded to K', a multiple of 16, with zeros; the library's matmul multiplies them and
one small kernel adds bias and position. The patch rows are what the weight gradient needs, so the
backward reads no image. `fused=True` does all of it in one kernel that never writes patch rows (the
backward gathers them again).

Mean and std are applied to pixels, never folded into the weight: a channel's scale and shift are
computed once a column, one multiply-add a pixel.

Bytes moved a patch, uint8 in and bf16 out: two steps K + 4 * K' + 6 * D, fused K + 2 * D; the
released code normalises and embeds all N patches and then gathers K of them.
Rows of 16 or 32 uint8 pixels are read 16 bytes at a time; of 14 pixels, 2 bytes: the start of such
a row is no multiple of more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from masked_vit_kernels import cpu
from masked_vit_kernels.launch import KernelLaunch, check_dtype, check_same_device
from masked_vit_kernels.packing import Packing
from masked_vit_kernels.rows import (
    RowIndex,
    column_block,
    locate_rows,
    row_index,
    sum_rows_by_place,
    takes_triton,
    tile_rows,
    with_unit_columns,
)

if TYPE_CHECKING:
    from masked_vit_kernels.audit import AuditCase

IMAGE_DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)

# ----------------------------------------------------------------------------- kernels


@triton.jit
def _patch_origins(images, tokens, STRIDE_B, STRIDE_H, STRIDE_W, PH, PW, GRID_WIDTH: tl.constexpr):
    """Offset of each patch's first pixel, int64."""
    patch_rows = tokens // GRID_WIDTH
    patch_columns = tokens % GRID_WIDTH
    return images * STRIDE_B + patch_rows * (PH * STRIDE_H) + patch_columns * (PW * STRIDE_W)


@triton.jit
def _pixel_offsets(columns, STRIDE_C, STRIDE_H, STRIDE_W, PH, PW: tl.constexpr):
    """Offset of pixel k = (channel, row, column) of a patch from the patch's first pixel."""
    # One division at a time: the compiler then knows that PW pixels in a row are contiguous.
    pixel_rows = columns // PW  # of all channels
    channels = pixel_rows // PH
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


@triton.jit
def _patch_rows_kernel(
    images_ptr,  # (B, C, Hi, Wi)
    mean_ptr,  # (C,) or None
    std_ptr,  # (C,) or None
    indices_ptr,  # (R,) or None
    sequence_ids_ptr,  # (R,) or None
    out_ptr,  # (R, K')
    num_rows,
    num_tokens,
    rows_per_image,
    SEQUENCES_PER_IMAGE: tl.constexpr,
    STRIDE_B: tl.constexpr,
    STRIDE_C: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
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
        num_tokens, rows_per_image, SEQUENCES_PER_IMAGE,
    )  # fmt: skip
    origins = _patch_origins(images, tokens, STRIDE_B, STRIDE_H, STRIDE_W, PH, PW, GRID_WIDTH)
    offsets = _pixel_offsets(columns, STRIDE_C, STRIDE_H, STRIDE_W, PH, PW)
    scale, shift = _pixel_scale_and_shift(
        columns // (PH * PW), in_width, mean_ptr, std_ptr, PIXEL_SCALE
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


@triton.jit
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
    stride_xr,
    SEQUENCES_PER_IMAGE: tl.constexpr,
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
        num_tokens, rows_per_image, SEQUENCES_PER_IMAGE,
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


@triton.jit
def _add_position_backward_kernel(
    grad_ptr,  # (R, D)
    indices_ptr,  # (R,) or None
    sequence_ids_ptr,  # (R,) or None
    grad_x_ptr,  # (R, D): the gradient, zero on padding
    partial_ptr,  # (chunks, D) float32: its sum over the rows of each chunk
    num_rows,
    num_tokens,
    rows_per_image,
    rows_per_chunk,
    stride_gr,
    SEQUENCES_PER_IMAGE: tl.constexpr,
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
            num_tokens, rows_per_image, SEQUENCES_PER_IMAGE,
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


@triton.jit
def _fused_patch_embed_kernel(
    images_ptr,  # (B, C, Hi, Wi)
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
    SEQUENCES_PER_IMAGE: tl.constexpr,
    STRIDE_B: tl.constexpr,
    STRIDE_C: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
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
        num_tokens, rows_per_image, SEQUENCES_PER_IMAGE,
    )  # fmt: skip
    origins = _patch_origins(images, tokens, STRIDE_B, STRIDE_H, STRIDE_W, PH, PW, GRID_WIDTH)

    total = tl.zeros((BLOCK_ROWS, BLOCK_D), dtype=tl.float32)  # [BLOCK_ROWS, BLOCK_D]
    for start in range(0, K_PADDED, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        offsets = _pixel_offsets(k, STRIDE_C, STRIDE_H, STRIDE_W, PH, PW)
        scale, shift = _pixel_scale_and_shift(k // (PH * PW), k < K, mean_ptr, std_ptr, PIXEL_SCALE)
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
    images: Tensor, mean: Tensor | None, std: Tensor | None, patch: tuple[int, int]
) -> dict[str, object]:
    """Kernel parameters of the image. Its strides are constants: they decide how wide loads are."""
    ph, pw = patch
    stride_b, stride_c, stride_h, stride_w = images.stride()
    return {
        "images_ptr": images,
        "mean_ptr": mean,
        "std_ptr": std,
        "STRIDE_B": stride_b,
        "STRIDE_C": stride_c,
        "STRIDE_H": stride_h,
        "STRIDE_W": stride_w,
        "PH": ph,
        "PW": pw,
        "GRID_WIDTH": images.shape[3] // pw,
        "K": images.shape[1] * ph * pw,
        "PIXEL_SCALE": 1.0 / 255.0 if images.dtype == torch.uint8 else 1.0,
    }


def _num_patches(images: Tensor, patch: tuple[int, int]) -> int:
    return (images.shape[2] // patch[0]) * (images.shape[3] // patch[1])


def _padded_pixels(images: Tensor, patch: tuple[int, int]) -> int:
    """K': the pixels of a patch, rounded up to a multiple of 16."""
    return -(-images.shape[1] * patch[0] * patch[1] // 16) * 16


def patch_rows_launch(
    images: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    index: RowIndex,
    patch: tuple[int, int],
    out: Tensor,
) -> KernelLaunch:
    """images (B, C, Hi, Wi), mean and std (C,) -> out (R, K')."""
    num_rows, padded = out.shape
    block_k = min(triton.next_power_of_2(padded), 128)
    block_rows = tile_rows(out, block_k)
    return KernelLaunch(
        kernel=_patch_rows_kernel,
        grid=(triton.cdiv(num_rows, block_rows), triton.cdiv(padded, block_k)),
        arguments={
            **index.arguments(_num_patches(images, patch)),
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
    patch: tuple[int, int],
    out: Tensor,
) -> KernelLaunch:
    """images (B, C, Hi, Wi), weight (D, K'), bias (D,), position (N, D) -> out (R, D)."""
    num_rows, width = out.shape
    full_precision = weight.dtype == torch.float32
    block_rows, block_d, block_k = (64, 64, 32) if full_precision else (128, 128, 64)
    return KernelLaunch(
        kernel=_fused_patch_embed_kernel,
        grid=(triton.cdiv(width, block_d), triton.cdiv(num_rows, block_rows)),
        arguments={
            **index.arguments(_num_patches(images, patch)),
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
        num_stages=3,
    )


# ----------------------------------------------------------------------------- ops


@torch.library.custom_op("masked_vit_kernels::patch_rows", mutates_args=())
def patch_rows(
    images: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    indices: Tensor | None,
    sequence_ids: Tensor | None,
    rows_per_image: int,
    sequences_per_image: int,
    ph: int,
    pw: int,
    dtype: torch.dtype,
) -> Tensor:
    """images (B, C, Hi, Wi) -> normalised pixels (R, K') of the patches a `RowIndex` names."""
    index = RowIndex(indices, sequence_ids, rows_per_image, sequences_per_image)
    out = _empty_patch_rows(images, indices, rows_per_image, ph, pw, dtype)
    patch_rows_launch(images, mean, std, index, (ph, pw), out).run()
    return out


def _empty_patch_rows(images, indices, rows_per_image, ph, pw, dtype) -> Tensor:
    num_rows = images.shape[0] * rows_per_image if indices is None else indices.shape[0]
    return images.new_empty(num_rows, _padded_pixels(images, (ph, pw)), dtype=dtype)


@patch_rows.register_fake
def _(images, mean, std, indices, sequence_ids, rows_per_image, sequences_per_image, ph, pw, dtype):
    return _empty_patch_rows(images, indices, rows_per_image, ph, pw, dtype)


@torch.library.custom_op("masked_vit_kernels::patch_rows_image_gradient", mutates_args=())
def patch_rows_image_gradient(
    grad: Tensor,
    std: Tensor | None,
    indices: Tensor | None,
    sequence_ids: Tensor | None,
    rows_per_image: int,
    sequences_per_image: int,
    ph: int,
    pw: int,
    image_shape: list[int],
    image_dtype: torch.dtype,
) -> Tensor:
    """grad (R, K') -> (B, C, Hi, Wi): each patch back to its place, patches taken twice added."""
    batch, channels, height, width = image_shape
    grid = height // ph, width // pw
    num_tokens = grid[0] * grid[1]
    index = RowIndex(indices, sequence_ids, rows_per_image, sequences_per_image)
    places = index.places(grad.shape[0], num_tokens, grad.device)
    patches = grad[:, : channels * ph * pw]
    total = sum_rows_by_place(patches, places, batch * num_tokens, torch.float32)
    total = total.view(batch, *grid, channels, ph, pw).permute(0, 3, 1, 4, 2, 5)
    total = total.reshape(image_shape)
    if std is not None:
        total = total / std.view(1, -1, 1, 1)
    return total.to(image_dtype)


@patch_rows_image_gradient.register_fake
def _(
    grad, std, indices, sequence_ids, rows_per_image, sequences_per_image, ph, pw,
    image_shape, image_dtype,
):  # fmt: skip
    return grad.new_empty(image_shape, dtype=image_dtype)


@torch.library.custom_op("masked_vit_kernels::add_position", mutates_args=())
def add_position(
    x: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    indices: Tensor | None,
    sequence_ids: Tensor | None,
    rows_per_image: int,
    sequences_per_image: int,
    num_tokens: int,
) -> Tensor:
    """x (R, D) + bias (D,) + position (N, D) of each row's patch; zero on padding, in x's dtype."""
    index = RowIndex(indices, sequence_ids, rows_per_image, sequences_per_image)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    add_position_launch(with_unit_columns(x), bias, position, index, num_tokens, out).run()
    return out


@add_position.register_fake
def _(
    x, bias, position, indices, sequence_ids, rows_per_image, sequences_per_image, num_tokens
):  # fmt: skip
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("masked_vit_kernels::add_position_backward", mutates_args=())
def add_position_backward(
    grad: Tensor,
    indices: Tensor | None,
    sequence_ids: Tensor | None,
    rows_per_image: int,
    sequences_per_image: int,
    num_tokens: int,
) -> tuple[Tensor, Tensor]:
    """grad (R, D) -> the same with zeros on padding, and its float32 sum over the rows (D,)."""
    num_rows, width = grad.shape
    index = RowIndex(indices, sequence_ids, rows_per_image, sequences_per_image)
    grad = with_unit_columns(grad)
    grad_x = torch.empty_like(grad, memory_format=torch.contiguous_format)
    chunks = max(1, min(256, triton.cdiv(num_rows, 64)))
    partial = grad.new_empty(chunks, width, dtype=torch.float32)
    add_position_backward_launch(grad, index, num_tokens, grad_x, partial).run()
    return grad_x, partial.sum(0)


@add_position_backward.register_fake
def _(grad, indices, sequence_ids, rows_per_image, sequences_per_image, num_tokens):
    grad_x = torch.empty_like(grad, memory_format=torch.contiguous_format)
    return grad_x, grad.new_empty(grad.shape[1], dtype=torch.float32)


@torch.library.custom_op("masked_vit_kernels::position_gradient", mutates_args=())
def position_gradient(
    grad: Tensor,
    indices: Tensor | None,
    sequence_ids: Tensor | None,
    rows_per_image: int,
    sequences_per_image: int,
    num_tokens: int,
    dtype: torch.dtype,
) -> Tensor:
    """grad (R, D) -> (N, D): the sum over the rows of each patch id."""
    index = RowIndex(indices, sequence_ids, rows_per_image, sequences_per_image)
    places = index.places(grad.shape[0], num_tokens, grad.device)
    tokens = torch.where(places >= 0, places % num_tokens, -1)
    return sum_rows_by_place(grad, tokens, num_tokens, dtype)


@position_gradient.register_fake
def _(grad, indices, sequence_ids, rows_per_image, sequences_per_image, num_tokens, dtype):
    return grad.new_empty(num_tokens, grad.shape[1], dtype=dtype)


@torch.library.custom_op("masked_vit_kernels::fused_patch_embed", mutates_args=())
def fused_patch_embed(
    images: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    indices: Tensor | None,
    sequence_ids: Tensor | None,
    rows_per_image: int,
    sequences_per_image: int,
    ph: int,
    pw: int,
) -> Tensor:
    """The whole embedding in one kernel: weight (D, K'), position (N, D) -> (R, D)."""
    index = RowIndex(indices, sequence_ids, rows_per_image, sequences_per_image)
    out = _empty_tokens(images, weight, indices, rows_per_image)
    fused_patch_embed_launch(
        images, mean, std, weight.contiguous(), bias, position, index, (ph, pw), out
    ).run()
    return out


def _empty_tokens(images, weight, indices, rows_per_image) -> Tensor:
    num_rows = images.shape[0] * rows_per_image if indices is None else indices.shape[0]
    return weight.new_empty(num_rows, weight.shape[0])


@fused_patch_embed.register_fake
def _(
    images, mean, std, weight, bias, position, indices, sequence_ids,
    rows_per_image, sequences_per_image, ph, pw,
):  # fmt: skip
    return _empty_tokens(images, weight, indices, rows_per_image)


# ----------------------------------------------------------------------------- autograd


def _save_for_patch_rows_backward(ctx, inputs, output):
    images, _, std, indices, sequence_ids, *ctx.layout, _ = inputs
    ctx.save_for_backward(std, indices, sequence_ids)
    ctx.image_like = list(images.shape), images.dtype


def _patch_rows_backward(ctx, grad):
    grad_images = None
    if ctx.needs_input_grad[0]:
        grad_images = patch_rows_image_gradient(
            grad, *ctx.saved_tensors, *ctx.layout, *ctx.image_like
        )
    return grad_images, *[None] * 9


patch_rows.register_autograd(_patch_rows_backward, setup_context=_save_for_patch_rows_backward)


def _save_for_add_position_backward(ctx, inputs, output):
    _, bias, position, indices, sequence_ids, *ctx.layout = inputs
    ctx.save_for_backward(indices, sequence_ids)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.position_dtype = None if position is None else position.dtype


def _add_position_backward(ctx, grad):
    where = (*ctx.saved_tensors, *ctx.layout)
    grad_x, grad_bias = add_position_backward(grad, *where)
    grad_bias = grad_bias.to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
    grad_position = None
    if ctx.needs_input_grad[2]:
        grad_position = position_gradient(grad_x, *where, ctx.position_dtype)
    return grad_x, grad_bias, grad_position, *[None] * 5


add_position.register_autograd(
    _add_position_backward, setup_context=_save_for_add_position_backward
)


def _save_for_fused_backward(ctx, inputs, output):
    images, mean, std, weight, bias, position, indices, sequence_ids, *layout = inputs
    ctx.save_for_backward(images, mean, std, weight, indices, sequence_ids)
    ctx.layout, ctx.patch = layout[:2], layout[2:]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.position_dtype = None if position is None else position.dtype


def _fused_backward(ctx, grad):
    images, mean, std, weight, indices, sequence_ids = ctx.saved_tensors
    where = (indices, sequence_ids, *ctx.layout)
    num_tokens = _num_patches(images, ctx.patch)
    grad, grad_bias = add_position_backward(grad, *where, num_tokens)
    grad_images = grad_weight = grad_position = None
    if ctx.needs_input_grad[0]:
        grad_images = patch_rows_image_gradient(
            grad @ weight, std, *where, *ctx.patch, list(images.shape), images.dtype
        )
    if ctx.needs_input_grad[3]:
        patches = patch_rows(images, mean, std, *where, *ctx.patch, weight.dtype)
        grad_weight = grad.t() @ patches  # (D, K')
    grad_bias = grad_bias.to(ctx.bias_dtype) if ctx.needs_input_grad[4] else None
    if ctx.needs_input_grad[5]:
        grad_position = position_gradient(grad, *where, num_tokens, ctx.position_dtype)
    return grad_images, None, None, grad_weight, grad_bias, grad_position, *[None] * 6


fused_patch_embed.register_autograd(_fused_backward, setup_context=_save_for_fused_backward)


# ----------------------------------------------------------------------------- public function


def _check_images(images: Tensor, weight: Tensor) -> None:
    channels, ph, pw = weight.shape[1:]
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(
            f"images must have shape (B, {channels}, Hi, Wi), got {tuple(images.shape)}"
        )
    if images.shape[2] % ph or images.shape[3] % pw:
        raise ValueError(
            f"images of {images.shape[2]}x{images.shape[3]} pixels cannot be cut into"
            f" {ph}x{pw} patches: crop or resize to a multiple"
        )


def _channel_values(
    name: str, values: Sequence[float] | Tensor | None, images: Tensor
) -> Tensor | None:
    """(C,) float32 on the images' device."""
    if values is None:
        return None
    tensor = torch.as_tensor(values, dtype=torch.float32, device=images.device).reshape(-1)
    if tensor.shape[0] != images.shape[1]:
        raise ValueError(f"{name} must have {images.shape[1]} values, got {tensor.shape[0]}")
    return tensor.contiguous()


def embed_visible_patches(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    indices: Tensor | None = None,
    packing: Packing | None = None,
    *,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    fused: bool = False,
) -> Tensor:
    """Patch embedding plus position of the patches that `indices` names; the rest is never read.

    Args:
        images: (B, C, Hi, Wi) uint8, bf16, fp16 or fp32, any strides. uint8 pixels are divided
            by 255; then mean and std apply, to float images too.
        weight: (D, C, ph, pw), as of a convolution with stride (ph, pw).
        bias: (D,) or None. pos_embed: (N, D) or (1, N, D) in raster order, or None.
        indices: int32 or int64 patch ids, -1 for padding: (B, K), or (capacity,) with `packing`;
            None embeds every patch.
        mean, std: C values each. Where the call is captured in a CUDA graph give tensors on the
            device: a list is copied to it in every call.
        fused: on CUDA, one kernel instead of three launches. Not faster at every shape.

    Returns:
        (B, N, D), (B, K, D) or (capacity, D) in the autocast dtype or else weight's. Gradients for
        weight, bias, pos_embed and, if they require it, float images.

    Raises:
        ValueError: shapes that do not fit. IndexError: an id outside [-1, N), on the CPU; on CUDA
        such an id counts as padding.
    """
    if weight.ndim != 4:
        raise ValueError(f"weight must have shape (D, C, ph, pw), got {tuple(weight.shape)}")
    _check_images(images, weight)
    check_same_device(
        "images", images, weight=weight, bias=bias, pos_embed=pos_embed, indices=indices
    )
    batch, (width, _, ph, pw) = images.shape[0], weight.shape
    num_tokens = _num_patches(images, (ph, pw))
    if pos_embed is not None and pos_embed.numel() != num_tokens * width:
        raise ValueError(
            f"pos_embed must have shape ({num_tokens}, {width}), got {tuple(pos_embed.shape)}"
        )
    if indices is None:
        index, shape = RowIndex(None, None, num_tokens, 1), (batch, num_tokens)
    else:
        index, shape = row_index(indices, packing, batch), indices.shape
    if not takes_triton(images):
        return cpu.embed_visible_patches(
            images, weight, bias, pos_embed, indices, packing, mean=mean, std=std
        )

    check_dtype("images", images, IMAGE_DTYPES)
    device_type = images.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else weight.dtype
    weight = weight.flatten(1).to(dtype)  # (D, K)
    check_dtype("weight", weight)
    padding = _padded_pixels(images, (ph, pw)) - weight.shape[1]
    weight = F.pad(weight, (0, padding)) if padding else weight  # (D, K')
    position = None if pos_embed is None else pos_embed.reshape(num_tokens, width).contiguous()
    mean, std = _channel_values("mean", mean, images), _channel_values("std", std, images)
    if index.indices is not None:
        index = index._replace(indices=index.indices.contiguous())
    if fused:
        tokens = fused_patch_embed(images, mean, std, weight, bias, position, *index, ph, pw)
    else:
        patches = patch_rows(images, mean, std, *index, ph, pw, dtype)
        tokens = add_position(F.linear(patches, weight), bias, position, *index, num_tokens)
    return tokens.view(*shape, width)


# ----------------------------------------------------------------------------- compile audit


def audit_cases(capability: int) -> Iterator[AuditCase]:
    """Every kernel of this file: patch sizes 8 to 32, uint8 and float images."""
    from masked_vit_kernels.audit import AuditCase

    def meta(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    index = RowIndex(meta(4096, dtype=torch.int64), meta(4096, dtype=torch.int32), 1, 1)
    statistics = meta(3, dtype=torch.float32)
    for patch, size in ((8, 32), (12, 96), (14, 224), (16, 224), (32, 224)):
        for dtype in IMAGE_DTYPES:
            images = meta(8, 3, size, size, dtype=dtype)
            out = meta(4096, _padded_pixels(images, (patch, patch)), dtype=torch.bfloat16)
            narrow = (patch & -patch) * images.element_size() < 4
            name = f"patch={patch} {str(dtype).removeprefix('torch.')}"
            yield AuditCase(
                f"patch rows {name}",
                patch_rows_launch(images, statistics, statistics, index, (patch, patch), out),
                "narrow_pixels" if narrow else "pixels",
                core=dtype == torch.uint8 and patch in (14, 16),
            )
            weight = meta(768, out.shape[1], dtype=torch.bfloat16)
            vector = meta(768, dtype=torch.bfloat16)
            position = meta((size // patch) ** 2, 768, dtype=torch.float32)
            tokens = meta(4096, 768, dtype=torch.bfloat16)
            yield AuditCase(
                f"fused patch embed {name}",
                fused_patch_embed_launch(
                    images, statistics, statistics, weight, vector, position,
                    index, (patch, patch), tokens,
                ),
                "narrow_pixels_matmul" if narrow else "matmul",
                core=dtype == torch.uint8 and patch in (14, 16),
            )  # fmt: skip
    partial = meta(64, 768, dtype=torch.float32)
    yield AuditCase(
        "add position D=768",
        add_position_launch(tokens, vector, position, index, position.shape[0], tokens),
        "streaming",
    )
    yield AuditCase(
        "add position backward D=768",
        add_position_backward_launch(tokens, index, position.shape[0], tokens, partial),
        "streaming",
    )
