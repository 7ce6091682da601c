"""What the closing probes are given of every image: patch features, pooled in more than one way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa.evaluate.features import CONCATENATED_BLOCKS
from ijepa.vit import Encoder

LAST, LAST4 = "last block", "last 4 blocks"
MEAN_AND_STD, REGIONS = "last 4, mean and std", "last, 2x2 regions"


@torch.no_grad()
def pooled_features(encoder: Encoder, images: Tensor, batch_size: int = 256) -> dict[str, Tensor]:
    """Kind of pooling -> features of uint8 images (n, C, Hi, Wi), float32 on the host.

    The average over the patches of the last block, (n, D), and of the last four concatenated
    (n, 4 D), are the paper's (appendix A.2; fewer, where there are fewer blocks). Beside them the
    last four with each feature's standard deviation over the patches, (n, 8 D): the average forgets
    how often something occurs; and the last block averaged in the four quarters of the image,
    (n, 4 D): it forgets where.
    """
    device = next(encoder.parameters()).device
    count = min(CONCATENATED_BLOCKS, len(encoder.blocks))
    parts: dict[str, list[Tensor]] = {LAST: [], LAST4: [], MEAN_AND_STD: [], REGIONS: []}
    for batch in images.split(batch_size):
        layers = encoder.last_layers(batch.to(device), count)  # count x (B, N, D)
        each = [torch.std_mean(layer.float(), dim=1, correction=0) for layer in layers]
        mean = torch.cat([mean for _, mean in each], dim=1)  # (B, count * D)
        std = torch.cat([std for std, _ in each], dim=1)  # (B, count * D)
        parts[LAST].append(each[-1][1])
        parts[LAST4].append(mean)
        parts[MEAN_AND_STD].append(torch.cat([mean, std], dim=1))
        as_image = layers[-1].float().transpose(1, 2).unflatten(2, encoder.grid)  # (B, D, h, w)
        parts[REGIONS].append(F.adaptive_avg_pool2d(as_image, 2).flatten(1))
    return {kind: torch.cat([part.cpu() for part in found]) for kind, found in parts.items()}
