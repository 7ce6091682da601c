"""Build the predictor's input: each image's context, once a target block, with its mask tokens.

    out[r] = context[s] + position[context_ids[s]]             s = source_rows[r] < Tc
    out[r] = mask_token + position[target_ids[s - Tc]]         s >= Tc
    out[r] = 0                                                 s = -1, padding

One launch writes all B * M sequences. In the backward a context row gathers the gradients of its M
copies, in the order of the packing's `context_copies`; programs of the same launch sum the mask
tokens' rows, each into its own partial row, and a second reduction in a fixed order adds those. No
atomics: the same bits in every run.

Bytes moved a row of P elements, element size e: forward e * P written, e * P read (context rows and
positions are read M times, from L2); backward e * P read once and 1 / M of it written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from masked_vit_kernels.checks import check_index_dtype, check_same_device, check_shape
from masked_vit_kernels.kernel_language import tl, triton
from masked_vit_kernels.launch import KernelLaunch, runs_kernels
from masked_vit_kernels.packing import PredictorPacking
from masked_vit_kernels.tokens import cpu
from masked_vit_kernels.tokens.rows import column_block, sum_dtype, tile_rows, with_unit_columns
from masked_vit_kernels.tokens.sum_by_place import sum_rows_by_place

# ----------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["num_rows", "num_context", "num_targets", "num_positions"])
def _assemble_kernel(
    context_ptr,  # (Tc, P)
    mask_token_ptr,  # (P,)
    position_ptr,  # (N, P)
    context_ids_ptr,  # (Tc,)
    target_ids_ptr,  # (Tt,)
    source_rows_ptr,  # (Tp,)
    out_ptr,  # (Tp, P)
    num_rows,
    num_context,
    num_targets,
    num_positions,
    stride_ct,
    P: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_range = rows < num_rows
    in_width = columns < P
    sources = tl.load(source_rows_ptr + rows, mask=in_range, other=-1).to(tl.int64)
    is_context = (sources >= 0) & (sources < num_context)
    is_target = (sources >= num_context) & (sources < num_context + num_targets)
    context_ids = tl.load(context_ids_ptr + sources, mask=is_context, other=-1).to(tl.int64)
    target_ids = tl.load(target_ids_ptr + sources - num_context, mask=is_target, other=-1).to(
        tl.int64
    )
    ids = tl.where(is_context, context_ids, target_ids)
    placed = (ids >= 0) & (ids < num_positions)

    mask_token = tl.load(mask_token_ptr + columns, mask=in_width, other=0).to(SUM_DTYPE)
    context = tl.load(  # [BLOCK_ROWS, BLOCK_P]
        context_ptr + sources[:, None] * stride_ct + columns[None, :],
        mask=is_context[:, None] & in_width[None, :],
        other=0,
    ).to(SUM_DTYPE)
    position = tl.load(  # [BLOCK_ROWS, BLOCK_P]
        position_ptr + ids[:, None] * P + columns[None, :],
        mask=placed[:, None] & in_width[None, :],
        other=0,
    ).to(SUM_DTYPE)
    tokens = tl.where(is_target[:, None], mask_token[None, :], context) + position
    tl.store(
        out_ptr + rows[:, None] * P + columns[None, :],
        tokens.to(out_ptr.dtype.element_ty),
        mask=in_range[:, None] & in_width[None, :],
    )


@triton.jit(
    do_not_specialize=["num_context", "num_targets", "context_programs", "targets_per_chunk"]
)
def _assemble_backward_kernel(
    grad_ptr,  # (Tp, P)
    context_copies_ptr,  # (Tc, M)
    target_rows_ptr,  # (Tt,)
    grad_context_ptr,  # (Tc, P)
    partial_ptr,  # (chunks, P): the mask token's gradient, summed over each chunk of targets
    num_context,
    num_targets,
    context_programs,
    targets_per_chunk,
    stride_gr,
    COPIES: tl.constexpr,
    P: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_width = columns < P
    total = tl.zeros((BLOCK_ROWS, BLOCK_P), dtype=SUM_DTYPE)  # [BLOCK_ROWS, BLOCK_P]
    if program < context_programs:
        context_rows = program * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        in_range = context_rows < num_context
        for copy in tl.static_range(COPIES):
            rows = tl.load(
                context_copies_ptr + context_rows * COPIES + copy, mask=in_range, other=-1
            ).to(tl.int64)
            total += tl.load(
                grad_ptr + rows[:, None] * stride_gr + columns[None, :],
                mask=(rows >= 0)[:, None] & in_width[None, :],
                other=0,
            ).to(SUM_DTYPE)
        tl.store(
            grad_context_ptr + context_rows[:, None] * P + columns[None, :],
            total.to(grad_context_ptr.dtype.element_ty),
            mask=in_range[:, None] & in_width[None, :],
        )
    else:
        chunk = program - context_programs
        first = chunk * targets_per_chunk
        for step in range(0, targets_per_chunk, BLOCK_ROWS):
            targets = first + step + tl.arange(0, BLOCK_ROWS)
            rows = tl.load(target_rows_ptr + targets, mask=targets < num_targets, other=-1).to(
                tl.int64
            )
            total += tl.load(
                grad_ptr + rows[:, None] * stride_gr + columns[None, :],
                mask=(rows >= 0)[:, None] & in_width[None, :],
                other=0,
            ).to(SUM_DTYPE)
        tl.store(partial_ptr + chunk * P + columns, tl.sum(total, axis=0), mask=in_width)


# ----------------------------------------------------------------------------- launches


def assemble_launch(
    context: Tensor,
    mask_token: Tensor,
    position: Tensor,
    context_ids: Tensor,
    target_ids: Tensor,
    source_rows: Tensor,
    out: Tensor,
) -> KernelLaunch:
    """context (Tc, P) with unit column stride, the rest contiguous -> out (Tp, P)."""
    num_rows, width = out.shape
    block_p = column_block(width)
    block_rows = tile_rows(out, block_p)
    return KernelLaunch(
        kernel=_assemble_kernel,
        grid=(triton.cdiv(num_rows, block_rows), triton.cdiv(width, block_p)),
        arguments={
            "context_ptr": context,
            "mask_token_ptr": mask_token,
            "position_ptr": position,
            "context_ids_ptr": context_ids,
            "target_ids_ptr": target_ids,
            "source_rows_ptr": source_rows,
            "out_ptr": out,
            "num_rows": num_rows,
            "num_context": context.shape[0],
            "num_targets": target_ids.shape[0],
            "num_positions": position.shape[0],
            "stride_ct": context.stride(0),
            "P": width,
            "BLOCK_ROWS": block_rows,
            "BLOCK_P": block_p,
            "SUM_DTYPE": sum_dtype(context),
        },
    )


def assemble_backward_launch(
    grad: Tensor,
    context_copies: Tensor,
    target_rows: Tensor,
    grad_context: Tensor,
    partial: Tensor,
) -> KernelLaunch:
    """grad (Tp, P) with unit column stride -> grad_context (Tc, P), partial (chunks, P)."""
    num_context, width = grad_context.shape
    chunks = partial.shape[0]
    block_p = column_block(width)
    block_rows = max(1, tile_rows(grad, block_p) // 2)
    context_programs = triton.cdiv(num_context, block_rows)
    per_chunk = triton.cdiv(target_rows.shape[0], chunks)
    return KernelLaunch(
        kernel=_assemble_backward_kernel,
        grid=(context_programs + chunks, triton.cdiv(width, block_p)),
        arguments={
            "grad_ptr": grad,
            "context_copies_ptr": context_copies,
            "target_rows_ptr": target_rows,
            "grad_context_ptr": grad_context,
            "partial_ptr": partial,
            "num_context": num_context,
            "num_targets": target_rows.shape[0],
            "context_programs": context_programs,
            "targets_per_chunk": triton.cdiv(per_chunk, block_rows) * block_rows,
            "stride_gr": grad.stride(0),
            "COPIES": context_copies.shape[1],
            "P": width,
            "BLOCK_ROWS": block_rows,
            "BLOCK_P": block_p,
            "SUM_DTYPE": sum_dtype(grad),
        },
    )


# ----------------------------------------------------------------------------- ops


@torch.library.custom_op("masked_vit_kernels::assemble_predictor_rows", mutates_args=())
def assemble_predictor_rows(
    context: Tensor,
    mask_token: Tensor,
    position: Tensor,
    context_ids: Tensor,
    target_ids: Tensor,
    source_rows: Tensor,
    context_copies: Tensor,
    target_rows: Tensor,
) -> Tensor:
    """context (Tc, P), mask_token (P,), position (N, P) -> (Tp, P); the last two for backward."""
    out = context.new_empty(source_rows.shape[0], context.shape[1])
    assemble_launch(
        with_unit_columns(context), mask_token.contiguous(), position.contiguous(),
        context_ids.contiguous(), target_ids.contiguous(), source_rows.contiguous(), out,
    ).run()  # fmt: skip
    return out


@assemble_predictor_rows.register_fake
def _(
    context, mask_token, position, context_ids, target_ids, source_rows, context_copies, target_rows
):
    return context.new_empty(source_rows.shape[0], context.shape[1])


@torch.library.custom_op("masked_vit_kernels::assemble_predictor_rows_backward", mutates_args=())
def assemble_predictor_rows_backward(
    grad: Tensor, context_copies: Tensor, target_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """grad (Tp, P) -> grad_context (Tc, P) and the mask token's gradient (P,), float32 or wider."""
    width, num_targets = grad.shape[1], target_rows.shape[0]
    grad_context = grad.new_empty(context_copies.shape[0], width)
    chunks = max(1, min(128, triton.cdiv(num_targets, 64)))
    wide = torch.promote_types(grad.dtype, torch.float32)
    partial = grad.new_empty(chunks, width, dtype=wide)
    assemble_backward_launch(
        with_unit_columns(grad), context_copies.contiguous(), target_rows.contiguous(),
        grad_context, partial,
    ).run()  # fmt: skip
    return grad_context, partial.sum(0)


@assemble_predictor_rows_backward.register_fake
def _(grad, context_copies, target_rows):
    wide = torch.promote_types(grad.dtype, torch.float32)
    grad_context = grad.new_empty(context_copies.shape[0], grad.shape[1])
    return grad_context, grad.new_empty(grad.shape[1], dtype=wide)


@torch.library.custom_op("masked_vit_kernels::predictor_position_gradient", mutates_args=())
def predictor_position_gradient(
    grad: Tensor,
    context_ids: Tensor,
    target_ids: Tensor,
    source_rows: Tensor,
    num_positions: int,
    dtype: torch.dtype,
) -> Tensor:
    """grad (Tp, P) -> (N, P): the sum over the rows that stand at each position."""
    ids = torch.cat([context_ids.long(), target_ids.long()])
    places = torch.where(source_rows >= 0, ids[source_rows.clamp(min=0)], -1)
    return sum_rows_by_place(grad, places, num_positions, dtype)


@predictor_position_gradient.register_fake
def _(grad, context_ids, target_ids, source_rows, num_positions, dtype):
    return grad.new_empty(num_positions, grad.shape[1], dtype=dtype)


# ----------------------------------------------------------------------------- autograd


def _save_for_backward(ctx, inputs, output):
    _, mask_token, position, *ids = inputs
    ctx.save_for_backward(*ids)
    ctx.mask_dtype = mask_token.dtype
    ctx.num_positions, ctx.position_dtype = position.shape[0], position.dtype


def _backward(ctx, grad):
    context_ids, target_ids, source_rows, context_copies, target_rows = ctx.saved_tensors
    grad_context, grad_mask = assemble_predictor_rows_backward(grad, context_copies, target_rows)
    grad_position = None
    if ctx.needs_input_grad[2]:
        grad_position = predictor_position_gradient(
            grad, context_ids, target_ids, source_rows, ctx.num_positions, ctx.position_dtype
        )
    return grad_context, grad_mask.to(ctx.mask_dtype), grad_position, *[None] * 5


assemble_predictor_rows.register_autograd(_backward, setup_context=_save_for_backward)


# ----------------------------------------------------------------------------- public function


def assemble_predictor_tokens(
    context: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    context_ids: Tensor,
    target_ids: Tensor,
    predictor_packing: PredictorPacking,
) -> Tensor:
    """The predictor's packed input (paper section 3): its context, then each block's mask tokens.

    Args:
        context: (Tc, P) rows of the context encoder, projected to the predictor's width.
        mask_token: P elements, (P,) or (1, 1, P). pos_embed: (N, P) or (1, N, P).
        context_ids: (Tc,) int32 or int64 patch ids of the context rows, -1 for padding.
        target_ids: (Tt,) patch ids of the target rows, in the order of the target packing.
        predictor_packing: from `pack_predictor`, B * M sequences in `capacity` rows.

    Returns:
        (capacity, P) in context's dtype, zero on padding. Gradients for context (the sum over an
        image's blocks), mask_token and pos_embed.

    Raises:
        ValueError: shapes that do not fit. IndexError: an id outside [-1, N), on the CPU; on CUDA
        such a row gets no position.
    """
    packing = predictor_packing
    check_shape("context", context, (packing.context_copies.shape[0], None), "(Tc, P)")
    num_context, width = context.shape
    if mask_token.numel() != width:
        raise ValueError(f"mask_token must have {width} elements, got {tuple(mask_token.shape)}")
    if pos_embed.shape[-1] != width or pos_embed.numel() != pos_embed.shape[-2] * width:
        raise ValueError(f"pos_embed must have shape (N, {width}), got {tuple(pos_embed.shape)}")
    check_index_dtype("context_ids", context_ids)
    check_index_dtype("target_ids", target_ids)
    check_shape("context_ids", context_ids, (num_context,), f"({num_context},)")
    num_targets = packing.target_rows.shape[0]
    check_shape("target_ids", target_ids, (num_targets,), f"({num_targets},)")
    check_same_device(
        "context", context, mask_token=mask_token, pos_embed=pos_embed, context_ids=context_ids,
        target_ids=target_ids, predictor_packing=packing.source_rows,
    )  # fmt: skip
    if not runs_kernels(context.device):
        return cpu.assemble_predictor_tokens(
            context, mask_token, pos_embed, context_ids, target_ids, packing
        )
    return assemble_predictor_rows(
        context, mask_token.reshape(width), pos_embed.reshape(-1, width), context_ids, target_ids,
        packing.source_rows, packing.context_copies, packing.target_rows,
    )  # fmt: skip
