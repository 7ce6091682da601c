"""Where the predicted features of a target block match: the predictor, looked at patch by patch.

Predictions and targets are compared by cosine, the targets normalised as the loss takes them and
less their mean over everything compared: without that all patches look alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa.evaluate.learning import normalised_targets
from ijepa.masks.batch import MaskBatch
from ijepa.model import IJEPA


@dataclass(frozen=True)
class Matches:
    """What the predictions of some images' target blocks resemble.

    Attributes:
        maps: (B, M, B, N) float32: mean over the patches of image b's block m of the cosine between
            its prediction and patch n of image c, at [b, m, c, n].
        place: share of the target patches whose own place is the most alike of their image.
        place_chance: of guessing, 1 / N.
        image: share whose own image is the most alike at their place, among the B images.
        image_chance: of guessing, 1 / B.
    """

    maps: Tensor
    place: float
    place_chance: float
    image: float
    image_chance: float


@torch.no_grad()
def prediction_matches(model: IJEPA, images: Tensor, masks: MaskBatch) -> Matches:
    """Compare the predictions of every target patch with every patch of every image.

    Args:
        images: (B, C, Hi, Wi) uint8, few: B * B * N similarities a target patch are held.
        masks: theirs, on the same device.

    Raises:
        ValueError: features that are not finite.
    """
    targets = normalised_targets(model.patch_targets(images), model.config.target_norm)
    targets = targets.float()  # (B, N, D)
    count, patches = targets.shape[:2]
    valid = masks.targets >= 0
    predictions = model.predict(images, masks)[valid].float()  # (T, D)
    if not (bool(targets.isfinite().all()) and bool(predictions.isfinite().all())):
        raise ValueError("features are not finite: the network has diverged")
    mean = targets.mean(dim=(0, 1))
    unit = F.normalize(targets - mean, dim=2)
    cosines = torch.einsum("td,cnd->tcn", F.normalize(predictions - mean, dim=1), unit)

    rows = masks.target_rows[valid]
    image, place = rows // patches, rows % patches
    at = torch.arange(len(rows), device=rows.device)
    own_image = cosines[at, image]  # (T, N)
    own_place = cosines[at, :, place]  # (T, B)
    lengths = masks.target_packing.cu_seqlens.diff().long()  # (B * M,)
    blocks = len(lengths)
    sequence = torch.repeat_interleave(torch.arange(blocks, device=rows.device), lengths)
    sums = torch.zeros(blocks, count, patches, device=rows.device).index_add_(0, sequence, cosines)
    maps = sums / lengths.clamp(min=1).view(-1, 1, 1)
    return Matches(
        maps=maps.view(count, masks.num_targets, count, patches).cpu(),
        place=(own_image.argmax(dim=1) == place).float().mean().item(),
        place_chance=1 / patches,
        image=(own_place.argmax(dim=1) == image).float().mean().item(),
        image_chance=1 / count,
    )
