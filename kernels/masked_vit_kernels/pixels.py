"""Images as the networks read them, in plain PyTorch: pixels normalised and cut into patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def normalize_images(
    images: Tensor, mean: Sequence[float] | Tensor | None, std: Sequence[float] | Tensor | None
) -> Tensor:
    """Pixels as the networks see them: (x / 255 - mean) / std for uint8, (x - mean) / std else.

    Args:
        images: (B, C, H, W), uint8 from 0 to 255 or floating.
        mean, std: C values each, or None for 0 and 1.

    Returns:
        (B, C, H, W) float32; float64 where the images are.
    """
    pixels = images if images.dtype == torch.float64 else images.float()
    if images.dtype == torch.uint8:
        pixels = pixels / 255.0
    if mean is not None:
        pixels = pixels - _per_channel(mean, pixels)
    return pixels if std is None else pixels / _per_channel(std, pixels)


def _per_channel(values: Sequence[float] | Tensor, pixels: Tensor) -> Tensor:
    """(C, 1, 1) in the pixels' dtype, on their device."""
    return torch.as_tensor(values, dtype=pixels.dtype, device=pixels.device).reshape(-1, 1, 1)


def extract_patches(images: Tensor, patch_size: Sequence[int]) -> Tensor:
    """(B, C, H, W) -> (B, N, C * ph * pw) in the images' dtype.

    Patches come in raster order, the pixels of each in the order (C, ph, pw): that of a weight
    (D, C, ph, pw) flattened. H and W are multiples of ph and pw. Clips (B, C, F, H, W) are cut
    into tubelets (pt, ph, pw), in the order (time, row, column).
    """
    if len(patch_size) == 3:
        pt, ph, pw = patch_size
        frames = images.unflatten(4, (-1, pw)).unflatten(3, (-1, ph)).unflatten(2, (-1, pt))
        return frames.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
    ph, pw = patch_size
    by_patch = images.unflatten(3, (-1, pw)).unflatten(2, (-1, ph))  # (B, C, rows, ph, columns, pw)
    return by_patch.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
