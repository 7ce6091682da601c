"""One vector for an image: what the target encoder says of it, or the predictor of a block."""

from __future__ import annotations

import torch
from torch import Tensor

from ijepa.masks.batch import MaskBatch
from ijepa.model import IJEPA


@torch.no_grad()
def pooled_targets(model: IJEPA, images: Tensor) -> Tensor:
    """(B, D) float32: mean over all patches of the target encoder's output (paper, Figure 7)."""
    return model.target_encoder(images).float().mean(dim=1)


@torch.no_grad()
def pooled_prediction(model: IJEPA, images: Tensor, masks: MaskBatch) -> Tensor:
    """(B, target width) float32: the mean of the predictor's output over each image's first target
    block (paper, Figure 6)."""
    predictions = model.predict(images, masks)
    rows = predictions[masks.targets >= 0].float()
    lengths = masks.target_packing.cu_seqlens.diff().long()  # (B * M,)
    block = torch.repeat_interleave(torch.arange(len(lengths), device=rows.device), lengths)
    sums = rows.new_zeros(len(lengths), rows.shape[1]).index_add_(0, block, rows)
    means = sums / lengths.clamp(min=1)[:, None]
    return means.view(masks.batch_size, masks.num_targets, -1)[:, 0]
