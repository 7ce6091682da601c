"""A small vision transformer on packed tokens, shared by the four methods beside it.

Tokens of all sequences lie end to end in one (T, D) tensor, and a `Packing` says where each lies:
images that keep different numbers of patches need neither padding nor a mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from masked_vit_kernels import Packing, embed_visible_patches, varlen_attention_qkvpacked
from torch import Tensor, nn


class Patches(nn.Module):
    """Patch embedding and positions: images (B, C, H, W) or clips (B, C, F, H, W) to tokens."""

    def __init__(self, channels: int, patch: tuple[int, ...], num_tokens: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, channels, *patch) * 0.05)
        self.bias = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.randn(num_tokens, width) * 0.02)

    def forward(self, images: Tensor, ids: Tensor | None = None, packing: Packing | None = None):
        """Those that `ids` name: (B, K, D), packed (T, D), or all (B, N, D)."""
        return embed_visible_patches(images, self.weight, self.bias, self.positions, ids, packing)


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """(T, D) -> (T, D)."""
        qkv = self.qkv(self.norm1(x)).unflatten(1, (3, self.heads, -1))  # (T, 3, H, D / H)
        mixed = varlen_attention_qkvpacked(
            qkv, packing.cu_seqlens, packing.max_seqlen, packing=packing
        )
        assert isinstance(mixed, Tensor)  # no LSE was asked for
        x = x + self.proj(mixed.flatten(1))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Blocks(nn.Module):
    """Blocks and a last LayerNorm."""

    def __init__(self, width: int, depth: int, heads: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """(T, D) -> (T, D)."""
        for block in self.blocks:
            x = block(x, packing)
        return self.norm(x)
