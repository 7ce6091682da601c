"""Frozen features: the final LayerNorm on every block output used, then the mean over patches.

The paper evaluates the target encoder and reports the better of `last` (the last block) and
`last4` (the last four blocks concatenated), see its appendix A.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from masked_vit_kernels.pixels import normalize_images
from torch import Tensor

from ijepa.vit import Encoder

CONCATENATED_BLOCKS = 4
Layers = Literal["last", "last4"]
LAYERS: tuple[Layers, ...] = ("last", "last4")


@dataclass(frozen=True)
class Features:
    """Average-pooled features of n images, float32 on the host.

    Attributes:
        last: (n, D) of the last block.
        last4: (n, 4 * D) of the last four blocks, the earliest first (all, where there are fewer).
    """

    last: Tensor
    last4: Tensor


def block_features(encoder: Encoder, images: Tensor, layers: Layers) -> Tensor:
    """(B, N, D) float32 features of every patch, D being that of the blocks together.

    Args:
        images: (B, C, Hi, Wi) on the encoder's device, as the encoder takes them.
        layers: "last" block, or the "last4" concatenated, the earliest first (all, where there are
            fewer).

    Raises:
        ValueError: other layers.
    """
    if layers not in LAYERS:
        raise ValueError(f"layers must be one of {', '.join(LAYERS)}, got {layers!r}")
    if layers == "last":
        return encoder(images).float()
    count = min(CONCATENATED_BLOCKS, len(encoder.blocks))
    return torch.cat(encoder.last_layers(images, count), dim=2).float()


@torch.no_grad()
def encoder_features(encoder: Encoder, images: Tensor, batch_size: int = 256) -> Features:
    """Both kinds of features of uint8 images (n, C, Hi, Wi), computed on the encoder's device."""
    device = next(encoder.parameters()).device
    count = min(CONCATENATED_BLOCKS, len(encoder.blocks))
    parts = []
    for batch in images.split(batch_size):
        layers = encoder.last_layers(batch.to(device), count)  # count x (B, N, D)
        parts.append(torch.cat([layer.mean(dim=1) for layer in layers], dim=1).float().cpu())
    last4 = torch.cat(parts)  # (n, count * D)
    return Features(last=last4[:, -last4.shape[1] // count :].contiguous(), last4=last4)


def pixel_features(
    images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], longest_side: int = 32
) -> Tensor:
    """Normalised pixels of uint8 images (n, C, Hi, Wi) as rows (n, C * h * w).

    Larger images are averaged down to `longest_side`: a probe on every pixel of a photograph
    would have more weights than there are images.
    """
    height, width = images.shape[2:]
    shrink = max(-(-max(height, width) // longest_side), 1)
    rows = []
    for batch in images.split(256):
        pixels = normalize_images(batch, mean, std)
        if shrink > 1:
            size = (max(height // shrink, 1), max(width // shrink, 1))
            pixels = F.adaptive_avg_pool2d(pixels, size)
        rows.append(pixels.flatten(1))
    return torch.cat(rows)
