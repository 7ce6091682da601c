"""Tokens of a sequence's own before its packed ones: class and register tokens.

    prepend:  out = [prefix of sequence 0, its tokens, prefix of sequence 1, its tokens, ...]
    split:    the inverse, (S, P, D) and the packed tokens

Either is the other's backward. Bytes moved a token of D elements of size e: 2 * e * D and 8 of map;
the prefix, P rows a sequence, is copied beside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from masked_vit_kernels.checks import check_same_device, check_shape
from masked_vit_kernels.launch import runs_kernels
from masked_vit_kernels.packing import PrefixPacking
from masked_vit_kernels.tokens import cpu
from masked_vit_kernels.tokens.gather_kernels import gather_rows_launch
from masked_vit_kernels.tokens.rows import RowIndex, with_unit_columns

# ----------------------------------------------------------------------------- ops


@torch.library.custom_op("masked_vit_kernels::prepend_rows", mutates_args=())
def prepend_rows(
    x: Tensor, prefix: Tensor, source_rows: Tensor, prefix_rows: Tensor, token_rows: Tensor
) -> Tensor:
    """x (T, D), prefix (S * P, D) -> (capacity, D) in x's dtype."""
    out = _gathered(x, source_rows)
    return out.index_copy_(0, prefix_rows, prefix.to(x.dtype))


@prepend_rows.register_fake
def _(x, prefix, source_rows, prefix_rows, token_rows):
    return x.new_empty(source_rows.shape[0], x.shape[1])


@torch.library.custom_op("masked_vit_kernels::split_rows", mutates_args=())
def split_rows(
    x: Tensor, source_rows: Tensor, prefix_rows: Tensor, token_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """x (capacity, D) -> prefix (S * P, D), tokens (T, D); `source_rows` concern the backward."""
    return x.index_select(0, prefix_rows), _gathered(x, token_rows)


@split_rows.register_fake
def _(x, source_rows, prefix_rows, token_rows):
    return tuple(x.new_empty(rows.shape[0], x.shape[1]) for rows in (prefix_rows, token_rows))


def _gathered(x: Tensor, rows: Tensor) -> Tensor:
    """(R, D): rows of x, zeros where the row is -1."""
    out = x.new_empty(rows.shape[0], x.shape[1])
    index = RowIndex(rows, None, max(rows.shape[0], 1), 1)
    gather_rows_launch(with_unit_columns(x)[None], index, out).run()
    return out


# ----------------------------------------------------------------------------- autograd


def _save_for_prepend_backward(ctx, inputs, output):
    _, prefix, *maps = inputs
    ctx.save_for_backward(*maps)
    ctx.prefix_dtype = prefix.dtype


def _prepend_backward(ctx, grad):
    grad_prefix, grad_x = split_rows(grad, *ctx.saved_tensors)
    return grad_x, grad_prefix.to(ctx.prefix_dtype), None, None, None


prepend_rows.register_autograd(_prepend_backward, setup_context=_save_for_prepend_backward)


def _save_for_split_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _split_backward(ctx, grad_prefix, grad_tokens):
    return prepend_rows(grad_tokens, grad_prefix, *ctx.saved_tensors), None, None, None


split_rows.register_autograd(_split_backward, setup_context=_save_for_split_backward)


# ----------------------------------------------------------------------------- public functions


def prepend_tokens(x: Tensor, prefix: Tensor, packing: PrefixPacking) -> Tensor:
    """Put class or register tokens before the packed tokens of every sequence.

    Args:
        x: (T, D), packed tokens as `pack_prefix` was told of them, T their capacity.
        prefix: (P, D) or (1, P, D), the same in all sequences, or (S, P, D); cast to x's dtype.
            Positions of their own are added before.
        packing: of `pack_prefix`.

    Returns:
        (packing.capacity, D) in x's dtype, zero on padding; gradients for x and prefix.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_same_device("x", x, prefix=prefix, packing=packing.source_rows)
    check_shape("x", x, (packing.token_rows.shape[0], None), f"({packing.token_rows.shape[0]}, D)")
    count, sequences, width = packing.num_prefix_tokens, packing.num_sequences, x.shape[1]
    shared = prefix.ndim == 2 or (prefix.ndim == 3 and prefix.shape[0] == 1)
    wanted = (count, width) if prefix.ndim == 2 else (1 if shared else sequences, count, width)
    if tuple(prefix.shape) != wanted:
        raise ValueError(
            f"prefix must have shape ({count}, {width}), (1, {count}, {width}) or ({sequences}, "
            f"{count}, {width}), got {tuple(prefix.shape)}"
        )
    rows = prefix.expand(sequences, count, width).reshape(-1, width)
    maps = (packing.source_rows, packing.prefix_rows, packing.token_rows)
    if not runs_kernels(x.device):
        return cpu.prepend_tokens(x, rows, *maps[:2])
    return prepend_rows(x, rows, *maps)


def split_prefix(x: Tensor, packing: PrefixPacking) -> tuple[Tensor, Tensor]:
    """Take the tokens that `prepend_tokens` put before, and the others.

    Args:
        x: (packing.capacity, D).
        packing: of `pack_prefix`.

    Returns:
        prefix (S, P, D) and tokens (T, D), zero on padding, in x's dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_same_device("x", x, packing=packing.source_rows)
    check_shape("x", x, (packing.capacity, None), f"({packing.capacity}, D), the capacity")
    maps = (packing.source_rows, packing.prefix_rows, packing.token_rows)
    if runs_kernels(x.device):
        prefix, tokens = split_rows(x, *maps)
    else:
        prefix, tokens = cpu.split_prefix(x, *maps[1:])
    return prefix.view(packing.num_sequences, packing.num_prefix_tokens, x.shape[1]), tokens
