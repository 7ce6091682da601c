"""The decoder: diffusers' U-Net, modulated by the time and a representation.

In every residual block a GroupNorm's scale and shift come from the sum of the time's embedding and
a linear map of the representation. The network predicts the noise, and where the variance of a
step lies between its bounds (a "learned sigma").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ijepa.visualize.rcdm.presets import Preset

MISSING = "RCDM needs the diffusers package: pip install 'ijepa[rcdm]'"


class Decoder(nn.Module):
    """Noisy images and representations to predicted noise and variances.

    Args:
        preset: sizes.
        width: of a representation.
        channels: of the images.

    Representations are standardised first, each feature by what `standardise` was told of it: the
    average-pooled features of a network share most of their values. That is this project's own
    addition to RCDM.

    Raises:
        ModuleNotFoundError: diffusers is not installed.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, preset: Preset, width: int, channels: int = 3):
        super().__init__()
        try:
            from diffusers import UNet2DModel
        except ImportError:
            raise ModuleNotFoundError(MISSING) from None
        self.preset, self.width, self.channels = preset, width, channels
        widths = [preset.channels * factor for factor in preset.multipliers]
        sides = [preset.image_size // 2**level for level in range(len(widths))]
        attended = [side in preset.attention for side in sides]
        self.condition = nn.Linear(width, 4 * preset.channels)
        self.unet: Any = UNet2DModel(
            sample_size=preset.image_size,
            in_channels=channels,
            out_channels=2 * channels,
            layers_per_block=preset.blocks,
            block_out_channels=tuple(widths),
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attended),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in attended[::-1]),
            downsample_type="resnet",
            upsample_type="resnet",
            attention_head_dim=preset.head_width,
            norm_num_groups=32,
            class_embed_type="identity",
            resnet_time_scale_shift="scale_shift",
        )
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    @torch.no_grad()
    def standardise(self, representations: Tensor) -> None:
        """Take mean and deviation of each feature from (n, width) representations, n >= 2."""
        std, mean = torch.std_mean(representations.double(), dim=0)
        self.mean.copy_(mean)
        self.std.copy_(std.clamp(min=1e-6))

    def forward(self, noisy: Tensor, steps: Tensor, representations: Tensor) -> Tensor:
        """(B, C, H, W) in about [-1, 1], (B,) int64 and (B, width) -> (B, 2 C, H, W): the noise,
        then the place of the log variance between its bounds, -1 to 1."""
        condition = self.condition((representations - self.mean) / self.std)
        return self.unet(noisy, steps, class_labels=condition).sample
