"""Sizes of the decoder: the released one at 128 pixels, a compact one at 64, one for two cores."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """A U-Net, from the outermost level inwards.

    Attributes:
        image_size: side in pixels, of images that are made.
        channels: of the outermost level, a multiple of 32 (GroupNorm has 32 groups).
        multipliers: channels of each level over that; each level has half the side of the last.
        attention: sides at which there is self-attention.
        blocks: residual blocks of a level.
        head_width: channels of an attention head.
    """

    image_size: int
    channels: int
    multipliers: tuple[int, ...]
    attention: tuple[int, ...]
    blocks: int
    head_width: int

    def __post_init__(self):
        if self.channels % 32 or self.channels < 32:
            raise ValueError(f"channels must be a multiple of 32, got {self.channels}")
        if self.image_size % 2 ** (len(self.multipliers) - 1):
            raise ValueError(
                f"image_size {self.image_size} cannot be halved {len(self.multipliers) - 1} times"
            )


PRESETS: dict[str, Preset] = {
    "tiny": Preset(32, 32, (1, 2, 2), (8,), 1, 32),
    "compact": Preset(64, 64, (1, 2, 3, 4), (16, 8), 2, 64),
    "released": Preset(128, 256, (1, 1, 2, 3, 4), (32, 16, 8), 2, 64),
}
