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
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from masked_vit_kernels.checks import check_dtype, check_same_device, check_shape
from masked_vit_kernels.kernel_language import triton
from masked_vit_kernels.launch import runs_kernels, table_capability
from masked_vit_kernels.packing import Packing
from masked_vit_kernels.tokens import cpu
from masked_vit_kernels.tokens.patch_embed_kernels import (
    IMAGE_DTYPES,
    add_position_backward_launch,
    add_position_launch,
    fused_patch_embed_launch,
    num_patches,
    padded_pixels,
    patch_rows_launch,
)
from masked_vit_kernels.tokens.rows import RowIndex, row_index, with_unit_columns
from masked_vit_kernels.tokens.sum_by_place import sum_rows_by_place

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
    patch: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """images -> normalised pixels (R, K') of the patches that a `RowIndex` names."""
    index = RowIndex(indices, sequence_ids, rows_per_image, sequences_per_image)
    out = _empty_patch_rows(images, indices, rows_per_image, patch, dtype)
    patch_rows_launch(images, mean, std, index, patch, out).run()
    return out


def _empty_patch_rows(images, indices, rows_per_image, patch, dtype) -> Tensor:
    num_rows = images.shape[0] * rows_per_image if indices is None else indices.shape[0]
    return images.new_empty(num_rows, padded_pixels(images, patch), dtype=dtype)


@patch_rows.register_fake
def _(images, mean, std, indices, sequence_ids, rows_per_image, sequences_per_image, patch, dtype):
    return _empty_patch_rows(images, indices, rows_per_image, patch, dtype)


@torch.library.custom_op("masked_vit_kernels::patch_rows_image_gradient", mutates_args=())
def patch_rows_image_gradient(
    grad: Tensor,
    std: Tensor | None,
    indices: Tensor | None,
    sequence_ids: Tensor | None,
    rows_per_image: int,
    sequences_per_image: int,
    patch: list[int],
    image_shape: list[int],
    image_dtype: torch.dtype,
) -> Tensor:
    """grad (R, K') -> `image_shape`: each patch back to its place, patches taken twice added."""
    batch, channels, *sizes = image_shape
    grid = [size // side for size, side in zip(sizes, patch, strict=True)]
    num_tokens = math.prod(grid)
    index = RowIndex(indices, sequence_ids, rows_per_image, sequences_per_image)
    places = index.places(grad.shape[0], num_tokens, grad.device)
    patches = grad[:, : channels * math.prod(patch)]
    total = sum_rows_by_place(patches, places, batch * num_tokens, torch.float32)
    total = total.view(batch, *grid, channels, *patch)
    axes = len(patch)  # (B, grid, C, patch) -> (B, C, then grid and patch of each axis)
    total = total.permute(0, axes + 1, *(i for a in range(axes) for i in (1 + a, axes + 2 + a)))
    total = total.reshape(image_shape)
    if std is not None:
        total = total / std.view(-1, *[1] * axes)
    return total.to(image_dtype)


@patch_rows_image_gradient.register_fake
def _(
    grad, std, indices, sequence_ids, rows_per_image, sequences_per_image, patch,
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
    patch: list[int],
) -> Tensor:
    """The whole embedding in one kernel: weight (D, K'), position (N, D) -> (R, D)."""
    index = RowIndex(indices, sequence_ids, rows_per_image, sequences_per_image)
    out = _empty_tokens(images, weight, indices, rows_per_image)
    fused_patch_embed_launch(
        images, mean, std, weight.contiguous(), bias, position, index, patch, out,
        table_capability(images.device),
    ).run()  # fmt: skip
    return out


def _empty_tokens(images, weight, indices, rows_per_image) -> Tensor:
    num_rows = images.shape[0] * rows_per_image if indices is None else indices.shape[0]
    return weight.new_empty(num_rows, weight.shape[0])


@fused_patch_embed.register_fake
def _(
    images, mean, std, weight, bias, position, indices, sequence_ids,
    rows_per_image, sequences_per_image, patch,
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
    return grad_images, *[None] * 8


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
    *ctx.layout, ctx.patch = layout
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.position_dtype = None if position is None else position.dtype


def _fused_backward(ctx, grad):
    images, mean, std, weight, indices, sequence_ids = ctx.saved_tensors
    where = (indices, sequence_ids, *ctx.layout)
    num_tokens = num_patches(images, ctx.patch)
    grad, grad_bias = add_position_backward(grad, *where, num_tokens)
    grad_images = grad_weight = grad_position = None
    if ctx.needs_input_grad[0]:
        grad_images = patch_rows_image_gradient(
            grad @ weight, std, *where, ctx.patch, list(images.shape), images.dtype
        )
    if ctx.needs_input_grad[3]:
        patches = patch_rows(images, mean, std, *where, ctx.patch, weight.dtype)
        grad_weight = grad.t() @ patches  # (D, K')
    grad_bias = grad_bias.to(ctx.bias_dtype) if ctx.needs_input_grad[4] else None
    if ctx.needs_input_grad[5]:
        grad_position = position_gradient(grad, *where, num_tokens, ctx.position_dtype)
    return grad_images, None, None, grad_weight, grad_bias, grad_position, *[None] * 5


fused_patch_embed.register_autograd(_fused_backward, setup_context=_save_for_fused_backward)


# ----------------------------------------------------------------------------- public function


def _check_images(images: Tensor, weight: Tensor) -> None:
    channels, *patch = weight.shape[1:]
    if images.ndim != weight.ndim or images.shape[1] != channels:
        sizes = "Hi, Wi" if len(patch) == 2 else "F, Hi, Wi"
        raise ValueError(
            f"images must have shape (B, {channels}, {sizes}), got {tuple(images.shape)}"
        )
    if any(size % side for size, side in zip(images.shape[2:], patch, strict=True)):
        pixels, sides = ("x".join(map(str, sizes)) for sizes in (images.shape[2:], patch))
        raise ValueError(
            f"images of {pixels} pixels cannot be cut into {sides} patches: crop or resize to a "
            "multiple"
        )


def _check_channel_values(
    name: str, values: Sequence[float] | Tensor | None, channels: int
) -> None:
    if values is None:
        return
    count = values.numel() if isinstance(values, Tensor) else len(values)
    if count != channels:
        raise ValueError(f"{name} must have {channels} values, got {count}")


def _patch_positions(
    pos_embed: Tensor | None, num_tokens: int, width: int, num_prefix_tokens: int
) -> Tensor | None:
    """(N, D) without the rows that stand before the patches'."""
    if pos_embed is None:
        return None
    rows = num_prefix_tokens + num_tokens
    if pos_embed.numel() != rows * width or num_prefix_tokens < 0:
        raise ValueError(
            f"pos_embed must have shape ({rows}, {width}), of {num_tokens} patches after "
            f"{num_prefix_tokens} prefix tokens (num_prefix_tokens), got {tuple(pos_embed.shape)}"
        )
    return pos_embed.reshape(rows, width)[num_prefix_tokens:]


def _channel_values(values: Sequence[float] | Tensor | None, images: Tensor) -> Tensor | None:
    """(C,) float32 on the images' device."""
    if values is None:
        return None
    tensor = torch.as_tensor(values, dtype=torch.float32, device=images.device)
    return tensor.reshape(-1).contiguous()


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
    num_prefix_tokens: int = 0,
    fused: bool = False,
) -> Tensor:
    """Patch embedding plus position of the patches that `indices` names; the rest is never read.

    Args:
        images: (B, C, Hi, Wi), or clips of F frames (B, C, F, Hi, Wi): uint8, bf16, fp16 or fp32,
            any strides. uint8 pixels are divided by 255; then mean and std apply, to float images
            too. On the CPU also float64.
        weight: (D, C, ph, pw), as of a convolution with stride (ph, pw); of clips (D, C, pt, ph,
            pw), whose patches are tubelets of pt frames, numbered in the order (time, row, column).
        bias: (D,) or None. pos_embed: (N, D) or (1, N, D) in raster order, or None.
        indices: int32 or int64 patch ids, -1 for padding: (B, K), or (capacity,) with `packing`;
            None embeds every patch.
        mean, std: C values each. Where the call is captured in a CUDA graph give tensors on the
            device: a list is copied to it in every call.
        num_prefix_tokens: rows of pos_embed before the patches' own, for class or register tokens;
            they are left out here (`prepend_tokens` puts such tokens before the patches).
        fused: on CUDA, one kernel instead of three launches. Not faster at every shape.

    Returns:
        (B, N, D), (B, K, D) or (capacity, D) in the autocast dtype or else weight's. Gradients for
        weight, bias, pos_embed and, if they require it, float images.

    Raises:
        ValueError: shapes that do not fit. IndexError: an id outside [-1, N), on the CPU; on CUDA
        such an id counts as padding.
    """
    check_same_device(
        "images", images, weight=weight, bias=bias, pos_embed=pos_embed, indices=indices
    )
    if weight.ndim not in (4, 5) or 0 in weight.shape:
        raise ValueError(
            "weight must have shape (D, C, ph, pw), or (D, C, pt, ph, pw) of clips, got "
            f"{tuple(weight.shape)}"
        )
    _check_images(images, weight)
    by_kernels = runs_kernels(images.device)
    # In float64 tests hold the CPU path to the reference; it has no kernel.
    check_dtype("images", images, IMAGE_DTYPES if by_kernels else (*IMAGE_DTYPES, torch.float64))
    if bias is not None:
        check_shape("bias", bias, weight.shape[:1], f"({weight.shape[0]},)")
    _check_channel_values("mean", mean, images.shape[1])
    _check_channel_values("std", std, images.shape[1])
    batch, (width, _, *patch) = images.shape[0], weight.shape
    num_tokens = num_patches(images, patch)
    pos_embed = _patch_positions(pos_embed, num_tokens, width, num_prefix_tokens)
    if indices is None:
        index, shape = RowIndex(None, None, num_tokens, 1), torch.Size((batch, num_tokens))
    else:
        index, shape = row_index(indices, packing, batch), indices.shape
    if not by_kernels:
        return cpu.embed_visible_patches(
            images, weight, bias, pos_embed, indices, packing, mean=mean, std=std
        )

    device_type = images.device.type
    # Asked of a device type without autocast (meta) torch raises, and torch.compile cannot trace
    # the question whether there is one.
    autocast = device_type in ("cuda", "cpu") and torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else weight.dtype
    weight = weight.flatten(1).to(dtype)  # (D, K)
    check_dtype("weight", weight)
    padding = padded_pixels(images, patch) - weight.shape[1]
    weight = F.pad(weight, (0, padding)) if padding else weight  # (D, K')
    position = None if pos_embed is None else pos_embed.contiguous()
    mean, std = _channel_values(mean, images), _channel_values(std, images)
    if index.indices is not None:
        index = index._replace(indices=index.indices.contiguous())
    if fused:
        tokens = fused_patch_embed(images, mean, std, weight, bias, position, *index, patch)
    else:
        patches = patch_rows(images, mean, std, *index, patch, dtype)
        tokens = add_position(F.linear(patches, weight), bias, position, *index, num_tokens)
    return tokens.view(*shape, width)
