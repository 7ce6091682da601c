"""The vision transformer on packed tokens: blocks, and the encoder built of them.

Tokens of all images lie end to end in one (T, D) tensor (see `masked_vit_kernels.packing`), so
every image keeps its own number of visible patches. Parameters carry the names of the released
checkpoints; their LayerNorms have eps 1e-6 (paper appendix A.1 names the sizes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from masked_vit_kernels import (
    Packing,
    embed_visible_patches,
    gather_tokens,
    pack_lengths,
    varlen_attention_kvpacked,
    varlen_attention_qkvpacked,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ijepa.config import ModelConfig
from ijepa.positions import resize_positions, sincos_positions

LAYER_NORM_EPS = 1e-6
INIT_STD = 0.02


@dataclass(frozen=True)
class KeptRows:
    """The rows of a packed tensor that the last block has to compute; the others only serve keys.

    Attributes:
        rows: (K,) int64 rows, sequence by sequence; -1 on padding.
        packing: as many sequences as the tensor has, `packing.capacity` = K.
    """

    rows: Tensor
    packing: Packing


class Attention(nn.Module):
    """Multi-head self-attention within each packed sequence."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} cannot be shared among {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """(T, D) -> (T, D)."""
        tokens, width = x.shape
        qkv = self.qkv(x).view(tokens, 3, self.heads, width // self.heads)
        mixed = varlen_attention_qkvpacked(
            qkv, packing.cu_seqlens, packing.max_seqlen, packing=packing
        )
        return self.proj(mixed.reshape(tokens, width))

    def attend_from(self, kept: Tensor, kept_packing: Packing, x: Tensor, packing: Packing):
        """Queries from `kept` (K, D), keys and values from `x` (T, D) -> (K, D)."""
        width = x.shape[1]
        split = (self.heads, width // self.heads)
        query_weight, key_value_weight = self.qkv.weight.split([width, 2 * width])
        query_bias, key_value_bias = self.qkv.bias.split([width, 2 * width])
        mixed = varlen_attention_kvpacked(
            F.linear(kept, query_weight, query_bias).view(-1, *split),
            F.linear(x, key_value_weight, key_value_bias).view(-1, 2, *split),
            kept_packing.cu_seqlens,
            packing.cu_seqlens,
            kept_packing.max_seqlen,
            packing.max_seqlen,
            packing_q=kept_packing,
            packing_k=packing,
        )
        return self.proj(mixed.reshape(-1, width))


class MLP(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = MLP(width, round(width * mlp_ratio))

    def forward(self, x: Tensor, packing: Packing, kept: KeptRows | None = None) -> Tensor:
        """(T, D) -> (T, D), or only the `kept` rows of it -> (K, D)."""
        if kept is None:
            x = x + self.attn(self.norm1(x), packing)
        else:
            residual = gather_tokens(x, kept.rows)  # (K, D)
            x = residual + self.attn.attend_from(
                self.norm1(residual), kept.packing, self.norm1(x), packing
            )
        return x + self.mlp(self.norm2(x))


def make_blocks(width: int, depth: int, heads: int, mlp_ratio: float) -> nn.ModuleList:
    """`depth` blocks of one size."""
    return nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))


def run_blocks(
    blocks: Sequence[Block],
    x: Tensor,
    packing: Packing,
    *,
    kept: KeptRows | None = None,
    activation_checkpointing: bool = False,
) -> Tensor:
    """(T, D) through all blocks; with `kept`, the last one computes those rows alone -> (K, D)."""
    recompute = activation_checkpointing and torch.is_grad_enabled()
    for index, block in enumerate(blocks):
        block_kept = kept if index == len(blocks) - 1 else None
        if recompute:
            x = checkpoint(block, x, packing, block_kept, use_reentrant=False)
        else:
            x = block(x, packing, block_kept)
    return x


@torch.no_grad()
def initialize(module: nn.Module, blocks: Sequence[Block], rescale: bool) -> None:
    """Truncated normal of std .02 for weights, zero biases; in place.

    Args:
        rescale: divide each block's two output weights by sqrt(2 * layer). The released code
            does so and then initialises once more, which undoes it.
    """
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(child.weight, std=INIT_STD)
            nn.init.zeros_(child.bias)
    if rescale:
        for layer, block in enumerate(blocks, start=1):
            block.attn.proj.weight.div_(math.sqrt(2.0 * layer))
            block.mlp.fc2.weight.div_(math.sqrt(2.0 * layer))


class PatchEmbed(nn.Module):
    """Holder of the patch embedding's weights under their released names (`proj.weight`, ...)."""

    def __init__(self, channels: int, width: int, patch_size: tuple[int, int]):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)


class Encoder(nn.Module):
    """ViT without a class token: images, or some of their patches, to features."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.grid = config.grid
        self.patch_size = config.patch_size
        self.image_mean, self.image_std = config.image_mean, config.image_std
        self.activation_checkpointing = config.activation_checkpointing
        self.patch_embed = PatchEmbed(config.channels, config.width, config.patch_size)
        self.pos_embed = nn.Parameter(
            sincos_positions(config.width, config.grid), requires_grad=False
        )
        self.blocks = make_blocks(config.width, config.depth, config.heads, config.mlp_ratio)
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self._dense_packings: dict[tuple[int, int, torch.device], Packing] = {}
        initialize(self, self.blocks, config.rescale_init)
        nn.init.trunc_normal_(self.patch_embed.proj.weight, std=config.patch_init_std)

    def forward(
        self,
        images: Tensor,
        ids: Tensor | None = None,
        packing: Packing | None = None,
        *,
        kept: KeptRows | None = None,
    ) -> Tensor:
        """Features after the final norm.

        Args:
            images: (B, C, Hi, Wi), uint8 (normalised here with the config's mean and std) or
                floating point (taken as normalised). Sizes other than the config's are embedded
                with resized positions.
            ids: (T,) patch ids of `packing`'s sequences, -1 on padding; None takes every patch.
            packing: B * m sequences, those of image 0 first.
            kept: rows to compute in the last block, among the T (or B * N) tokens.

        Returns:
            (T, D) packed; (B, N, D) without ids; (K, D) with `kept`.
        """
        x, packing = self._embed(images, ids, packing)
        x = run_blocks(
            self.blocks, x, packing, kept=kept,
            activation_checkpointing=self.activation_checkpointing,
        )  # fmt: skip
        x = self.norm(x)
        return x.view(images.shape[0], -1, x.shape[1]) if ids is None and kept is None else x

    def last_layers(self, images: Tensor, count: int) -> list[Tensor]:
        """Outputs of the last `count` blocks, each through the final norm: `count` x (B, N, D)."""
        if not 1 <= count <= len(self.blocks):
            raise ValueError(f"count must be in 1 to {len(self.blocks)}, got {count}")
        x, packing = self._embed(images, None, None)
        outputs = []
        for index, block in enumerate(self.blocks):
            x = block(x, packing)
            if index >= len(self.blocks) - count:
                outputs.append(self.norm(x).view(images.shape[0], -1, x.shape[1]))
        return outputs

    def _embed(self, images: Tensor, ids: Tensor | None, packing: Packing | None):
        """Tokens (T, D) of the patches in question, and their packing."""
        raw = images.dtype == torch.uint8
        proj = self.patch_embed.proj
        x = embed_visible_patches(
            images,
            proj.weight,
            proj.bias,
            self._positions(images),
            ids,
            packing,
            mean=self.image_mean if raw else None,
            std=self.image_std if raw else None,
        )
        if ids is None:
            packing = self._dense_packing(x.shape[0], x.shape[1], x.device)
        assert packing is not None  # ids come with their packing: embed_visible_patches checked
        # Under autocast the residual stream stays in float32, as in the released code.
        return x.reshape(-1, x.shape[-1]).to(proj.weight.dtype), packing

    def _positions(self, images: Tensor) -> Tensor:
        grid = (images.shape[2] // self.patch_size[0], images.shape[3] // self.patch_size[1])
        return (
            self.pos_embed
            if grid == self.grid
            else resize_positions(self.pos_embed, self.grid, grid)
        )

    def _dense_packing(self, batch: int, tokens: int, device: torch.device) -> Packing:
        """B sequences of N tokens, built once for each shape."""
        key = (batch, tokens, device)
        if key not in self._dense_packings:
            self._dense_packings[key] = pack_lengths([tokens] * batch).to(device)
        return self._dense_packings[key]
