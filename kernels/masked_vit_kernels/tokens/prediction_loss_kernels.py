"""Kernels of the latent loss and how they are launched; `prediction_loss.py` has the maths."""

from __future__ import annotations

from torch import Tensor

from masked_vit_kernels.kernel_language import tl, triton
from masked_vit_kernels.launch import KernelLaunch, round_up_to_power_of_two
from masked_vit_kernels.tokens import cpu
from masked_vit_kernels.tokens.rows import column_block

# ----------------------------------------------------------------------------- kernels


@triton.jit
def _target_row(target_rows_ptr, row, in_range, num_features):
    """The feature row that packed row `row` is held against (int64), and whether there is one."""
    target = tl.load(target_rows_ptr + row, mask=in_range, other=-1).to(tl.int64)
    return target, in_range & (target >= 0) & (target < num_features)


@triton.jit(do_not_specialize=["num_rows", "num_features", "rows_per_program"])
def _loss_forward_kernel(
    predictions_ptr,  # (Tt, D)
    features_ptr,  # (F, D)
    target_rows_ptr,  # (Tt,)
    mean_ptr,  # float32: (Tt,) to write, or (B, D) of the images
    rstd_ptr,  # float32, likewise
    cosines_ptr,  # (2, Tt) float32: a and b to write, for "cosine"
    partial_ptr,  # (2, programs) float32: loss sum, valid rows
    num_rows,
    num_features,
    rows_per_program,
    stride_pr,
    stride_fr,
    NORM: tl.constexpr,
    PATCHES: tl.constexpr,  # of an image, for "instance"
    EPS: tl.constexpr,
    DISTANCE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    in_width = columns < D
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    count = tl.zeros((), dtype=tl.float32)
    for step in range(0, rows_per_program):
        row = program * rows_per_program + step
        target, valid = _target_row(target_rows_ptr, row, row < num_rows, num_features)
        present = in_width & valid
        feature = tl.load(  # [BLOCK_D]
            features_ptr + target * stride_fr + columns, mask=present, other=0
        ).to(tl.float32)
        prediction = tl.load(  # [BLOCK_D]
            predictions_ptr + row * stride_pr + columns, mask=present, other=0
        ).to(tl.float32)
        if NORM == "layer":
            mean = tl.sum(feature, axis=0) / D
            centred = tl.where(in_width, feature - mean, 0.0)
            rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=0) / D + EPS)
            wanted = centred * rstd
        elif NORM == "instance":
            of_image = target // PATCHES * D + columns
            mean = tl.load(mean_ptr + of_image, mask=present, other=0)  # [BLOCK_D]
            rstd = tl.load(rstd_ptr + of_image, mask=present, other=0)  # [BLOCK_D]
            wanted = (feature - mean) * rstd
        else:
            wanted = feature
        difference = prediction - wanted
        if DISTANCE == "smooth_l1":
            magnitude = tl.abs(difference)
            distance = tl.where(magnitude < 1.0, 0.5 * difference * difference, magnitude - 0.5)
        elif DISTANCE == "l1":
            distance = tl.abs(difference)
        elif DISTANCE == "l2":
            distance = difference * difference
        else:
            wanted = tl.where(present, wanted, 0.0)
            square = tl.sum(prediction * prediction, axis=0)
            norms = tl.sqrt_rn(tl.maximum(square, 1e-16, propagate_nan=tl.PropagateNan.ALL))
            norms *= tl.sqrt_rn(tl.maximum(tl.sum(wanted * wanted, axis=0), 1e-16))
            cosine = tl.sum(prediction * wanted, axis=0) / norms
            distance = tl.where(columns == 0, 1.0 - cosine, 0.0)
            # A prediction shorter than 1e-8 is divided by a constant.
            along = tl.where(square < 1e-16, 0.0, cosine / square)
            tl.store(cosines_ptr + row, 1.0 / norms, mask=row < num_rows)
            tl.store(cosines_ptr + num_rows + row, along, mask=row < num_rows)
        total += tl.where(present, distance, 0.0)
        count += valid.to(tl.float32)
        if NORM == "layer":
            tl.store(mean_ptr + row, mean, mask=row < num_rows)
            tl.store(rstd_ptr + row, rstd, mask=row < num_rows)
    tl.store(partial_ptr + program, tl.sum(total, axis=0))
    tl.store(partial_ptr + tl.num_programs(0) + program, count)


@triton.jit(do_not_specialize=["num_programs", "width"])
def _loss_finish_kernel(
    partial_ptr,  # (2, programs) float32
    denominator_ptr,  # () or None: the number of valid elements
    out_ptr,  # (2,) float32: the loss, 1 / denominator
    num_programs,
    width,
    BLOCK: tl.constexpr,
):
    programs = tl.arange(0, BLOCK)
    present = programs < num_programs
    total = tl.sum(tl.load(partial_ptr + programs, mask=present, other=0), axis=0)
    if denominator_ptr is None:
        # Counts are exact in float32 up to 2^24 rows.
        rows = tl.sum(tl.load(partial_ptr + num_programs + programs, mask=present, other=0), axis=0)
        denominator = tl.maximum(rows * width, 1.0)
    else:
        denominator = tl.load(denominator_ptr).to(tl.float32)
    tl.store(out_ptr, total / denominator)
    tl.store(out_ptr + 1, 1.0 / denominator)


@triton.jit(do_not_specialize=["num_rows", "num_features"])
def _loss_backward_kernel(
    grad_loss_ptr,  # () gradient of the loss
    out_ptr,  # (2,) float32: the loss, 1 / denominator
    predictions_ptr,  # (Tt, D)
    features_ptr,  # (F, D)
    target_rows_ptr,  # (Tt,)
    mean_ptr,  # float32: (Tt,) of the rows, or (B, D) of the images
    rstd_ptr,  # float32, likewise
    cosines_ptr,  # (2, Tt) float32: a and b of the rows, for "cosine"
    grad_ptr,  # (Tt, D)
    num_rows,
    num_features,
    stride_pr,
    stride_fr,
    NORM: tl.constexpr,
    PATCHES: tl.constexpr,  # of an image, for "instance"
    DISTANCE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_range = rows < num_rows
    in_width = columns < D
    targets, valid = _target_row(target_rows_ptr, rows, in_range, num_features)
    present = valid[:, None] & in_width[None, :]
    scale = tl.load(grad_loss_ptr).to(tl.float32) * tl.load(out_ptr + 1)
    if NORM == "layer":
        mean = tl.load(mean_ptr + rows, mask=valid, other=0)[:, None]  # [BLOCK_ROWS, 1]
        rstd = tl.load(rstd_ptr + rows, mask=valid, other=0)[:, None]
    elif NORM == "instance":
        of_image = targets[:, None] // PATCHES * D + columns[None, :]
        mean = tl.load(mean_ptr + of_image, mask=present, other=0)  # [BLOCK_ROWS, BLOCK_D]
        rstd = tl.load(rstd_ptr + of_image, mask=present, other=0)
    feature = tl.load(  # [BLOCK_ROWS, BLOCK_D]
        features_ptr + targets[:, None] * stride_fr + columns[None, :], mask=present, other=0
    ).to(tl.float32)
    prediction = tl.load(  # [BLOCK_ROWS, BLOCK_D]
        predictions_ptr + rows[:, None] * stride_pr + columns[None, :], mask=present, other=0
    ).to(tl.float32)
    if NORM == "none":
        wanted = feature
    else:
        wanted = (feature - mean) * rstd
    difference = prediction - wanted
    if DISTANCE == "smooth_l1":  # written so that a NaN stays a NaN, here and below
        slope = tl.where(difference >= 1.0, 1.0, tl.where(difference <= -1.0, -1.0, difference))
    elif DISTANCE == "l1":
        slope = tl.where(difference > 0.0, 1.0, tl.where(difference < 0.0, -1.0, difference))
    elif DISTANCE == "l2":
        slope = 2.0 * difference
    else:
        across = tl.load(cosines_ptr + rows, mask=valid, other=0)[:, None]  # [BLOCK_ROWS, 1]
        along = tl.load(cosines_ptr + num_rows + rows, mask=valid, other=0)[:, None]
        slope = along * prediction - across * wanted
    grad = tl.where(valid[:, None], slope * scale, 0.0)
    tl.store(
        grad_ptr + rows[:, None] * D + columns[None, :],
        grad.to(grad_ptr.dtype.element_ty),
        mask=in_range[:, None] & in_width[None, :],
    )


# ----------------------------------------------------------------------------- launches

MOST_PROGRAMS = 2048  # of the forward; their partial sums fit one program of the second reduction


def loss_programs(num_rows: int) -> int:
    """Programs of the forward for `num_rows` rows: a function of the shape, not of the device."""
    return max(1, triton.cdiv(num_rows, triton.cdiv(max(num_rows, 1), MOST_PROGRAMS)))


def loss_forward_launch(
    predictions: Tensor,
    features: Tensor,
    target_rows: Tensor,
    mean: Tensor,
    rstd: Tensor,
    partial: Tensor,
    kind: str,
    norm: str = "layer",
    patches: int = 1,
    cosines: Tensor | None = None,
) -> KernelLaunch:
    """predictions (Tt, D), features (F, D), unit column strides -> partial sums, and for "layer"
    the statistics; for "instance", which reads them, `patches` is how many rows an image has.
    cosines: (2, Tt) to write, for "cosine"."""
    num_rows, width = predictions.shape
    block_d = round_up_to_power_of_two(width)
    return KernelLaunch(
        kernel=_loss_forward_kernel,
        grid=(partial.shape[1],),
        arguments={
            "predictions_ptr": predictions,
            "features_ptr": features,
            "target_rows_ptr": target_rows,
            "mean_ptr": mean,
            "rstd_ptr": rstd,
            "cosines_ptr": cosines,
            "partial_ptr": partial,
            "num_rows": num_rows,
            "num_features": features.shape[0],
            "rows_per_program": triton.cdiv(num_rows, partial.shape[1]),
            "stride_pr": predictions.stride(0),
            "stride_fr": features.stride(0),
            "NORM": norm,
            "PATCHES": patches,
            "EPS": cpu.TARGET_NORM_EPS,
            "DISTANCE": kind,
            "D": width,
            "BLOCK_D": block_d,
        },
        num_warps=max(1, min(8, block_d // 256)),
    )


def loss_finish_launch(
    partial: Tensor, denominator: Tensor | None, width: int, out: Tensor
) -> KernelLaunch:
    """Partial sums (2, programs) -> out (2,): the loss and 1 / denominator."""
    programs = partial.shape[1]
    return KernelLaunch(
        kernel=_loss_finish_kernel,
        grid=(1,),
        arguments={
            "partial_ptr": partial,
            "denominator_ptr": denominator,
            "out_ptr": out,
            "num_programs": programs,
            "width": width,
            "BLOCK": max(32, round_up_to_power_of_two(programs)),
        },
    )


def loss_backward_launch(
    grad_loss: Tensor,
    out: Tensor,
    predictions: Tensor,
    features: Tensor,
    target_rows: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad: Tensor,
    kind: str,
    norm: str = "layer",
    patches: int = 1,
    cosines: Tensor | None = None,
) -> KernelLaunch:
    """What the forward saved or was given -> grad (Tt, D) of the predictions."""
    num_rows, width = predictions.shape
    block_d = column_block(width)
    block_rows = max(1, 4096 // (predictions.element_size() * block_d))
    return KernelLaunch(
        kernel=_loss_backward_kernel,
        grid=(triton.cdiv(num_rows, block_rows), triton.cdiv(width, block_d)),
        arguments={
            "grad_loss_ptr": grad_loss,
            "out_ptr": out,
            "predictions_ptr": predictions,
            "features_ptr": features,
            "target_rows_ptr": target_rows,
            "mean_ptr": mean,
            "rstd_ptr": rstd,
            "cosines_ptr": cosines,
            "grad_ptr": grad,
            "num_rows": num_rows,
            "num_features": features.shape[0],
            "stride_pr": predictions.stride(0),
            "stride_fr": features.stride(0),
            "NORM": norm,
            "PATCHES": patches,
            "DISTANCE": kind,
            "D": width,
            "BLOCK_ROWS": block_rows,
            "BLOCK_D": block_d,
        },
    )
