"""Does the predictor learn from the context? What of the targets there is to be learned?

A joint-embedding loss can fall because targets are easy: the same at a position in every image, or
the same at every position of an image. Of targets t[b, n] (image b, position n, normalised as the
loss takes them), with m the mean over the images at a position, a the mean over the positions of an
image and g that of all:

    position     sum |m_n - g|^2       what the place alone tells
    image        sum |a_b - g|^2       what all patches of an image share
    interaction  the rest              what this patch of this image has to itself

each over the total sum |t - g|^2, so that the three add up to one. And of predictions p of target
rows:

    R2 = 1 - sum |p - t|^2 / sum |t - m|^2

the share that is predicted of what the position leaves open: 0 or less for a predictor that ignores
the context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa.masks.batch import MaskBatch
from ijepa.model import IJEPA

_EPS = 1e-5  # of the targets' normalisations


@dataclass(frozen=True)
class Learning:
    """What predictor and targets look like; see the module.

    Attributes:
        r2: share of the targets' variance around each position's mean that is predicted.
        position_share, image_share, interaction_share: of the targets' variance.
        encoder_grad_norm: of the context encoder's parameters together, on one batch.
    """

    r2: float
    position_share: float
    image_share: float
    interaction_share: float
    encoder_grad_norm: float


def measure_learning(model: IJEPA, batches: list[tuple[Tensor, MaskBatch]]) -> Learning | None:
    """Figures of batches of (images, masks), the same at every call, on the model's device.

    Needs a few images more than one at most positions; their gradient is that of the first batch.
    None where there is nothing to compare, or something is not finite.
    """
    positions, rows = _Sums(model), _Sums(model)
    image_means, error = [], 0.0
    with torch.no_grad():
        for images, masks in batches:
            patches = model.patch_targets(images)
            every = normalised_targets(patches, model.config.target_norm)  # (B, N, D)
            everywhere = torch.arange(every.shape[1], device=every.device).repeat(every.shape[0])
            positions.add(every.flatten(0, 1), everywhere)
            image_means.append(every.mean(dim=1))
            valid = masks.targets >= 0
            if model.config.target_masking == "input":  # other features than those of all patches
                features, target_rows = model.targets(images, masks)
                taken = features.flatten(0, -2)[target_rows[valid]]
                targets = normalised_targets(taken, model.config.target_norm)
            else:
                targets = every.flatten(0, 1)[masks.target_rows[valid]]
            rows.add(targets, masks.targets[valid])
            predictions = model.predict(images, masks)[valid]
            error += (predictions.double() - targets.double()).square().sum().item()
    position, image, total = positions.shares(torch.cat(image_means).double())
    open_to_context = rows.around_position()
    gradient = _encoder_gradient_norm(model, *batches[0])
    if not (total > 0 and open_to_context > 0 and _finite(error, total, gradient)):
        return None
    return Learning(
        r2=1 - error / open_to_context,
        position_share=position / total,
        image_share=image / total,
        interaction_share=1 - (position + image) / total,
        encoder_grad_norm=gradient,
    )


def learning_line(learning: Learning) -> str:
    """The figures in one line."""
    shares = "/".join(
        f"{100 * share:.0f}"
        for share in (learning.position_share, learning.image_share, learning.interaction_share)
    )
    return (
        f"R2 {learning.r2:.3f}  position/image/rest {shares} %  "
        f"encoder gradient {learning.encoder_grad_norm:.1e}"
    )


class _Sums:
    """Sums of target rows by position, from which variances follow; float64."""

    def __init__(self, model: IJEPA):
        shape = model.config.num_patches, model.config.target_width
        self._sum = torch.zeros(shape, dtype=torch.float64)
        self._count = torch.zeros(shape[0], dtype=torch.float64)
        self._squares = torch.zeros(shape[0], dtype=torch.float64)

    def add(self, rows: Tensor, position: Tensor) -> None:
        """Rows (R, D), each at its position (R,)."""
        rows, position = rows.double().cpu(), position.cpu()
        self._sum.index_add_(0, position, rows)
        self._count.index_add_(0, position, torch.ones_like(position, dtype=torch.float64))
        self._squares.index_add_(0, position, rows.square().sum(dim=1))

    def around_position(self) -> float:
        """Sum of squares around the true mean of each position, estimated without bias."""
        count = self._count
        several = count > 1
        around = self._squares - self._sum.square().sum(dim=1) / count.clamp(min=1)
        return (around * count / (count - 1).clamp(min=1))[several].sum().item()

    def shares(self, image_means: Tensor) -> tuple[float, float, float]:
        """Sums of squares of position means, image means (B, D) and all, around the mean of all;
        as many rows at every position."""
        images, count = image_means.shape[0], self._count.sum()
        mean = self._sum.sum(dim=0) / count
        position = images * (self._sum / images - mean).square().sum().item()
        image = self._sum.shape[0] * (image_means.cpu() - mean).square().sum().item()
        total = self._squares.sum().item() - count.item() * mean.square().sum().item()
        return position, image, total


def normalised_targets(targets: Tensor, norm: str) -> Tensor:
    """(B, N, D), or (R, D) unless the norm is over patches, as the loss takes them."""
    targets = targets.float()
    if norm == "layer":
        return F.layer_norm(targets, targets.shape[-1:], eps=_EPS)
    if norm == "instance":
        return F.instance_norm(targets.transpose(1, 2), eps=_EPS).transpose(1, 2)
    return targets


@torch.enable_grad()
def _encoder_gradient_norm(model: IJEPA, images: Tensor, masks: MaskBatch) -> float:
    """Of the loss of one batch; the parameters' own gradients are not touched."""
    parameters = [p for p in model.context_encoder.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(model(images, masks), parameters)
    return torch.linalg.vector_norm(
        torch.stack([gradient.double().norm() for gradient in gradients])
    ).item()


def _finite(*values: float) -> bool:
    return all(abs(value) < float("inf") for value in values)  # false for NaN
