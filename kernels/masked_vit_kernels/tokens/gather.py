"""Take rows of token tensors by index, and put them back.

    gather:   out[r] = x[image(r), indices[r]]                 zero where indices[r] = -1
    scatter:  out[b, n] = x[r] where (b, n) = (image(r), indices[r]), else fill[b, n]

Dense, packed and flat layouts differ only in image(r) (`rows.py`); one kernel serves all three.

The gradient of a gather is a scatter with fill zero when no row is taken twice, and a sum over
equal places otherwise (`rows.py`). A scatter first notes which row lies at each place, 4 bytes a
row, and then writes every place of the result once, in one launch.

Bytes moved a row of D elements: read and write once each, 2 * D * element size, plus the index
(and 12 bytes of map a place in the backward).
"""

from __future__ import annotations

import torch
from torch import Tensor

from masked_vit_kernels.checks import check_same_device, check_shape
from masked_vit_kernels.kernel_language import triton
from masked_vit_kernels.launch import runs_kernels
from masked_vit_kernels.packing import Packing
from masked_vit_kernels.tokens import cpu
from masked_vit_kernels.tokens.gather_kernels import (
    fill_gradient_launch,
    gather_rows_launch,
    invert_rows_launch,
    scatter_rows_launch,
)
from masked_vit_kernels.tokens.rows import RowIndex, row_index, with_unit_columns
from masked_vit_kernels.tokens.sum_by_place import sum_rows_by_place

# ----------------------------------------------------------------------------- ops


def _inverse_map(index: RowIndex, batch: int, num_tokens: int) -> Tensor:
    """(B * N,) int32: the row at each place that has one, anything elsewhere."""
    device = index.given_ids.device
    places = torch.empty(batch * num_tokens, dtype=torch.int32, device=device)
    invert_rows_launch(index, num_tokens, places).run()
    return places


@torch.library.custom_op("masked_vit_kernels::gather_rows", mutates_args=())
def gather_rows(
    x: Tensor,
    indices: Tensor,
    sequence_ids: Tensor | None,
    rows_per_image: int,
    sequences_per_image: int,
    unique: bool,
) -> Tensor:
    """x (B, N, D) by a `RowIndex` -> (R, D); `unique` concerns the backward."""
    index = RowIndex(indices.contiguous(), sequence_ids, rows_per_image, sequences_per_image)
    out = x.new_empty(indices.shape[0], x.shape[2])
    gather_rows_launch(with_unit_columns(x), index, out).run()
    return out


@gather_rows.register_fake
def _(x, indices, sequence_ids, rows_per_image, sequences_per_image, unique):
    return x.new_empty(indices.shape[0], x.shape[2])


@torch.library.custom_op("masked_vit_kernels::scatter_rows", mutates_args=())
def scatter_rows(
    x: Tensor,
    fill: Tensor | None,
    indices: Tensor,
    sequence_ids: Tensor | None,
    rows_per_image: int,
    sequences_per_image: int,
    batch: int,
    num_tokens: int,
) -> Tensor:
    """x (R, D), fill (D,), (N, D) or (B, N, D), None for zeros -> (B, N, D)."""
    index = RowIndex(indices.contiguous(), sequence_ids, rows_per_image, sequences_per_image)
    out = x.new_empty(batch, num_tokens, x.shape[1])
    if fill is not None:
        fill = with_unit_columns(fill.to(x.dtype)).expand(out.shape)
    place_to_row = _inverse_map(index, batch, num_tokens)
    scatter_rows_launch(with_unit_columns(x), fill, index, place_to_row, out).run()
    return out


@scatter_rows.register_fake
def _(x, fill, indices, sequence_ids, rows_per_image, sequences_per_image, batch, num_tokens):
    return x.new_empty(batch, num_tokens, x.shape[1])


@torch.library.custom_op("masked_vit_kernels::accumulate_rows", mutates_args=())
def accumulate_rows(
    grad: Tensor,
    indices: Tensor,
    sequence_ids: Tensor | None,
    rows_per_image: int,
    sequences_per_image: int,
    batch: int,
    num_tokens: int,
) -> Tensor:
    """grad (R, D) -> (B, N, D): the sums of the rows that share a place, in ascending order."""
    index = RowIndex(indices, sequence_ids, rows_per_image, sequences_per_image)
    places = index.places(grad.shape[0], num_tokens, grad.device)
    total = sum_rows_by_place(grad, places, batch * num_tokens, grad.dtype)
    return total.view(batch, num_tokens, grad.shape[1])


@accumulate_rows.register_fake
def _(grad, indices, sequence_ids, rows_per_image, sequences_per_image, batch, num_tokens):
    return grad.new_empty(batch, num_tokens, grad.shape[1])


@torch.library.custom_op("masked_vit_kernels::scatter_fill_gradient", mutates_args=())
def scatter_fill_gradient(
    grad: Tensor,
    indices: Tensor,
    sequence_ids: Tensor | None,
    rows_per_image: int,
    sequences_per_image: int,
    fill_shape: list[int],
    fill_dtype: torch.dtype,
) -> Tensor:
    """grad (B, N, D) -> `fill_shape`: what the places without a row received, summed over them."""
    batch, num_tokens, width = grad.shape
    index = RowIndex(indices.contiguous(), sequence_ids, rows_per_image, sequences_per_image)
    if len(fill_shape) == 1:
        chunks, inner = min(256, triton.cdiv(batch * num_tokens, 64)), 16
    else:
        inner = num_tokens if len(fill_shape) == 2 else batch * num_tokens
        chunks = 1 if len(fill_shape) == 3 else min(8, max(batch, 1))
    partial = grad.new_empty(
        chunks, inner, width, dtype=torch.promote_types(grad.dtype, torch.float32)
    )
    place_to_row = _inverse_map(index, batch, num_tokens)
    fill_gradient_launch(grad.contiguous(), index, place_to_row, partial).run()
    if len(fill_shape) == 1:
        partial = partial.view(-1, 1, width)
    return partial.sum(0).view(fill_shape).to(fill_dtype)


@scatter_fill_gradient.register_fake
def _(grad, indices, sequence_ids, rows_per_image, sequences_per_image, fill_shape, fill_dtype):
    return grad.new_empty(fill_shape, dtype=fill_dtype)


# ----------------------------------------------------------------------------- autograd


def _save_for_gather_backward(ctx, inputs, output):
    x, indices, sequence_ids, *ctx.layout, ctx.unique = inputs
    ctx.save_for_backward(indices, sequence_ids)
    ctx.batch, ctx.num_tokens = x.shape[:2]


def _gather_backward(ctx, grad):
    indices, sequence_ids = ctx.saved_tensors
    where = (indices, sequence_ids, *ctx.layout, ctx.batch, ctx.num_tokens)
    if ctx.unique:
        grad_x = scatter_rows(grad, None, *where)
    else:
        grad_x = accumulate_rows(grad, *where)
    return grad_x, None, None, None, None, None


gather_rows.register_autograd(_gather_backward, setup_context=_save_for_gather_backward)


def _save_for_scatter_backward(ctx, inputs, output):
    _, fill, indices, sequence_ids, *ctx.layout, ctx.batch, ctx.num_tokens = inputs
    ctx.save_for_backward(indices, sequence_ids)
    ctx.fill_like = None if fill is None else (list(fill.shape), fill.dtype)


def _scatter_backward(ctx, grad):
    indices, sequence_ids = ctx.saved_tensors
    where = (indices, sequence_ids, *ctx.layout)
    grad_x = grad_fill = None
    if ctx.needs_input_grad[0]:
        grad_x = gather_rows(grad, *where, True)
    if ctx.needs_input_grad[1]:
        grad_fill = scatter_fill_gradient(grad, *where, *ctx.fill_like)
    return grad_x, grad_fill, None, None, None, None, None, None


scatter_rows.register_autograd(_scatter_backward, setup_context=_save_for_scatter_backward)


# ----------------------------------------------------------------------------- public functions


def gather_tokens(x: Tensor, indices: Tensor, packing: Packing | None = None) -> Tensor:
    """Take rows of `x` by index; -1 gives a zero row that sends no gradient.

    Args:
        x: (B, N, D) tokens, or (T, D) flat rows; any dtype, strided views are read in place when
            their columns are contiguous.
        indices: int32 or int64 and -1 for padding: (B, K) token ids of each image; (capacity,)
            token ids with a `packing` of B sequences, or of B * M (all of image 0, then of image
            1, ...); or (K,) rows of a flat `x`. Duplicates are allowed.
        packing: the layout of packed indices. With a flat `x` only its promise `unique` is used.

    Returns:
        (B, K, D), (capacity, D) or (K, D) in x's dtype. The gradient adds the rows that were taken
        more than once, always in the same order; with `packing.unique` nothing has to be sorted.

    Raises:
        ValueError: shapes that do not fit. IndexError: an id outside [-1, N), on the CPU; on CUDA,
        where a check would synchronise, such an id counts as padding.
    """
    check_same_device("x", x, indices=indices)
    if x.ndim == 2:
        check_shape("indices", indices, (None,), "(K,) for flat x (T, D)")
        tokens, index = x[None], row_index(indices[None], None, 1)
    elif x.ndim == 3:
        tokens, index = x, row_index(indices, packing, x.shape[0])
    else:
        raise ValueError(f"x must have shape (B, N, D) or (T, D), got {tuple(x.shape)}")
    if not runs_kernels(x.device):
        return cpu.gather_tokens(x, indices, packing)
    unique = packing is not None and packing.unique
    return gather_rows(tokens, *index, unique).view(*indices.shape, x.shape[-1])


def _as_rows(fill: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """A view of `fill` as the kernels take it: (D,), (N, D) or (B, N, D) of `shape`.

    Raises:
        ValueError: it does not broadcast to `shape`.
    """
    sizes = (1,) * (3 - fill.ndim) + tuple(fill.shape)
    if len(sizes) > 3 or any(n not in (1, want) for n, want in zip(sizes, shape, strict=True)):
        raise ValueError(
            "fill must be a number or broadcast to (B, N, D), as (D,), (1, 1, D), (N, D) or "
            f"(1, N, D) do, here {shape}, got {tuple(fill.shape)}"
        )
    rows = fill.reshape(sizes).expand(*sizes[:2], shape[2])
    if sizes[0] != 1:
        return rows.expand(shape)
    return rows[0, 0] if sizes[1] == 1 else rows[0]


def scatter_tokens(
    x: Tensor,
    indices: Tensor,
    fill: Tensor | float,
    num_tokens: int,
    packing: Packing | None = None,
) -> Tensor:
    """Put rows back among `num_tokens` rows of `fill`: the inverse of `gather_tokens`.

    Args:
        x: (B, K, D), or packed (capacity, D) with a `packing` of B sequences, or (K, D) flat.
        indices: int32 or int64, the shape of x without D; unique within an image, -1 for padding.
        fill: what stands where no row is put, cast to x's dtype: a number, or a tensor that
            broadcasts to (B, N, D), such as a mask token (D,) or (1, 1, D), or positions with it,
            (N, D) or (1, N, D).
        num_tokens: N.

    Returns:
        (B, N, D), or (N, D) for flat x, in x's dtype; gradients for x and fill.

    Raises:
        ValueError: shapes that do not fit, and on the CPU two rows at one place (on CUDA one of
        them is kept). IndexError: an id outside [-1, N), on the CPU.
    """
    if not isinstance(fill, Tensor):
        fill = x.new_full((), fill)
    check_same_device("x", x, indices=indices, fill=fill)
    if x.ndim not in (2, 3):
        raise ValueError(f"x must have shape (B, K, D), (capacity, D) or (K, D), got {x.shape}")
    check_shape("indices", indices, x.shape[:-1], f"{tuple(x.shape[:-1])}")
    flat = x.ndim == 2 and packing is None
    if x.ndim == 3:
        batch = x.shape[0]
    else:
        batch = 1 if packing is None else packing.num_sequences
    index = row_index(indices[None] if flat else indices, packing, batch)
    fill = _as_rows(fill, (batch, num_tokens, x.shape[-1]))
    if not runs_kernels(x.device):
        return cpu.scatter_tokens(x, indices, fill, num_tokens, packing)
    out = scatter_rows(x.reshape(-1, x.shape[-1]), fill, *index, batch, num_tokens)
    return out[0] if flat else out
