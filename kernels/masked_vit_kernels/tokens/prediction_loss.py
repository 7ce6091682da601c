"""The loss in latent space: predictions against normalised target features, in one pass.

    f     = target_features[target_rows[r]]
    t[r]  = (f - mean(f)) / sqrt(var(f) + eps)      "layer", eps = 1e-5: over the row's features
            (f - mean_b) / sqrt(var_b + eps)        "instance": each one over the image's patches
            f                                       "none"
    d     = predictions[r] - t[r]
    loss  = sum over valid rows and columns of h(d) / denominator
    h(d)  = d^2 / 2 if |d| < 1 else |d| - 1/2       smooth L1;  d^2 for "l2";  |d| for "l1"
    grad  = h'(d) * grad_loss / denominator         zero on padding;  none for the targets

"cosine" has one distance a row instead, with |x| at least 1e-8 as in F.cosine_similarity:

    h(p, t)  = 1 - p . t / (|p| |t|)
    grad     = (b p - a t) * grad_loss / denominator,   a = 1 / (|p| |t|),   b = p . t a / |p|^2

The forward reads each prediction and each target row once. For "layer" it writes eight bytes a row,
mean and reciprocal deviation; for "instance" it reads those of the image (`image_statistics.py`);
"cosine" adds a and b. The backward recomputes d from them. The normalised targets are never in
memory. Sums are float32: a row in registers, then one partial sum a program, then one program that
adds the partials in a fixed order and divides, so that two runs give the same bits.

Bytes moved a row of D elements of size e: forward 2 * e * D, backward 3 * e * D. The statistics of
an image, 8 * D, come from the cache for all of its rows but the first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from masked_vit_kernels.checks import (
    check_dtype,
    check_index_dtype,
    check_same_device,
    check_shape,
)
from masked_vit_kernels.launch import runs_kernels
from masked_vit_kernels.tokens import cpu
from masked_vit_kernels.tokens.image_statistics import image_statistics
from masked_vit_kernels.tokens.prediction_loss_kernels import (
    loss_backward_launch,
    loss_finish_launch,
    loss_forward_launch,
    loss_programs,
)
from masked_vit_kernels.tokens.rows import with_unit_columns

KINDS = ("smooth_l1", "l2", "l1", "cosine")
TARGET_NORMS = ("layer", "instance", "none")

# ----------------------------------------------------------------------------- ops


@torch.library.custom_op("masked_vit_kernels::prediction_loss", mutates_args=())
def prediction_loss(
    predictions: Tensor,
    features: Tensor,
    target_rows: Tensor,
    denominator: Tensor | None,
    kind: str,
    norm: str = "layer",
    statistics: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> (2,) loss and 1 / denominator; mean (Tt,) and rstd (Tt,) of the target rows for "layer",
    empty for the others; a and b (2, Tt) for "cosine", empty for the others; all float32.
    `statistics` (2, B, D) are what "instance" divides by."""
    num_rows, width = predictions.shape
    out, mean, rstd, cosines = _outputs(predictions, kind, norm)
    partial = predictions.new_empty(2, loss_programs(num_rows), dtype=torch.float32)
    loss_forward_launch(
        with_unit_columns(predictions), with_unit_columns(features), target_rows.contiguous(),
        *_divisors(mean, rstd, statistics), partial, kind, norm, _patches(features, statistics),
        cosines if kind == "cosine" else None,
    ).run()  # fmt: skip
    values = 1 if kind == "cosine" else width  # of a row
    loss_finish_launch(partial, denominator, values, out).run()
    return out, mean, rstd, cosines


def _outputs(predictions: Tensor, kind: str, norm: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = predictions.shape[0] if norm == "layer" else 0
    out, mean, rstd = (predictions.new_empty(n, dtype=torch.float32) for n in (2, rows, rows))
    rows = predictions.shape[0] if kind == "cosine" else 0
    return out, mean, rstd, predictions.new_empty(2, rows, dtype=torch.float32)


def _divisors(mean: Tensor, rstd: Tensor, statistics: Tensor | None) -> tuple[Tensor, Tensor]:
    return (mean, rstd) if statistics is None else (statistics[0], statistics[1])


def _patches(features: Tensor, statistics: Tensor | None) -> int:
    """Rows of an image; without statistics, or of no image, nobody asks."""
    images = 0 if statistics is None else statistics.shape[1]
    return features.shape[0] // images if images else 1


@prediction_loss.register_fake
def _(predictions, features, target_rows, denominator, kind, norm="layer", statistics=None):
    return _outputs(predictions, kind, norm)


@torch.library.custom_op("masked_vit_kernels::prediction_loss_backward", mutates_args=())
def prediction_loss_backward(
    grad_loss: Tensor,
    out: Tensor,
    predictions: Tensor,
    features: Tensor,
    target_rows: Tensor,
    mean: Tensor,
    rstd: Tensor,
    cosines: Tensor,
    kind: str,
    norm: str = "layer",
    statistics: Tensor | None = None,
) -> Tensor:
    """The gradient of the predictions (Tt, D), in their dtype; grad_loss is 0-d."""
    grad = torch.empty_like(predictions, memory_format=torch.contiguous_format)
    loss_backward_launch(
        grad_loss, out, with_unit_columns(predictions), with_unit_columns(features),
        target_rows.contiguous(), *_divisors(mean, rstd, statistics), grad, kind, norm,
        _patches(features, statistics), cosines if kind == "cosine" else None,
    ).run()  # fmt: skip
    return grad


@prediction_loss_backward.register_fake
def _(grad_loss, out, predictions, *others):
    return torch.empty_like(predictions, memory_format=torch.contiguous_format)


# ----------------------------------------------------------------------------- autograd


def _save_for_backward(ctx, inputs, output):
    predictions, features, target_rows, _, ctx.kind, ctx.norm, statistics = inputs
    out, mean, rstd, cosines = output
    ctx.save_for_backward(out, predictions, features, target_rows, mean, rstd, cosines, statistics)
    ctx.mark_non_differentiable(mean, rstd, cosines)


def _backward(ctx, grad_out, grad_mean, grad_rstd, grad_cosines):
    *saved, statistics = ctx.saved_tensors
    grad = prediction_loss_backward(grad_out[0], *saved, ctx.kind, ctx.norm, statistics)
    return grad, None, None, None, None, None, None


prediction_loss.register_autograd(_backward, setup_context=_save_for_backward)


# ----------------------------------------------------------------------------- public function


def latent_prediction_loss(
    predictions: Tensor,
    target_features: Tensor,
    target_rows: Tensor,
    *,
    kind: str = "smooth_l1",
    target_norm: str = "layer",
    denominator: Tensor | None = None,
) -> Tensor:
    """Distance between predictions and the normalised target features they stand for.

    Args:
        predictions: (Tt, D), the predictor's output at its target rows.
        target_features: (B, N, D) or (R, D) output of the target encoder, before the normalisation
            that is applied here; for "instance" (B, N, D), every patch of every image. Receives no
            gradient.
        target_rows: (Tt,) int32 or int64, row b * N + patch of each prediction, -1 for padding.
        kind: "smooth_l1" (beta 1, the released code), "l2" (the paper), "l1" (V-JEPA) or "cosine"
            (1 - the cosine of a row and its target).
        target_norm: "layer", LayerNorm of each row without affine (the released code); "instance",
            each feature of an image standardised over its N patches (data2vec's choice); "none".
            Variances are biased, with eps 1e-5.
        denominator: 0-d tensor that the sum is divided by; default: the number of distances, valid
            rows times D and for "cosine" valid rows, at least 1.

    Returns:
        0-d float32 loss. A NaN in a valid row makes it NaN; padding may hold anything.

    Raises:
        ValueError: shapes that do not fit, an unknown kind or target_norm. IndexError: a row
        outside the features, on the CPU; on CUDA such a row counts as padding.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if target_norm not in TARGET_NORMS:
        raise ValueError(f"target_norm must be one of {TARGET_NORMS}, got {target_norm!r}")
    check_shape("predictions", predictions, (None, None), "(Tt, D)")
    num_rows, width = predictions.shape
    if target_features.ndim not in (2, 3) or target_features.shape[-1] != width:
        raise ValueError(
            f"target_features must have shape (B, N, {width}) or (R, {width}),"
            f" got {tuple(target_features.shape)}"
        )
    if target_norm == "instance" and target_features.ndim != 3:
        raise ValueError(
            f"target_norm 'instance' needs every patch of every image, target_features of shape "
            f"(B, N, {width}), got {tuple(target_features.shape)}"
        )
    check_shape("target_rows", target_rows, (num_rows,), f"({num_rows},)")
    check_index_dtype("target_rows", target_rows)
    check_same_device(
        "predictions", predictions, target_features=target_features, target_rows=target_rows,
        denominator=denominator,
    )  # fmt: skip
    if denominator is not None and denominator.numel() != 1:
        raise ValueError(f"denominator must have one element, got {tuple(denominator.shape)}")
    if not runs_kernels(predictions.device):
        return cpu.latent_prediction_loss(
            predictions, target_features, target_rows, kind=kind, target_norm=target_norm,
            denominator=denominator,
        )  # fmt: skip
    check_dtype("predictions", predictions)
    check_dtype("target_features", target_features)
    features = target_features.detach()
    statistics = image_statistics(features) if target_norm == "instance" else None
    out, *_ = prediction_loss(
        predictions, features.reshape(-1, width), target_rows, denominator, kind, target_norm,
        statistics,
    )  # fmt: skip
    return out[0]
