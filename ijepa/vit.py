"""The vision transformer on packed tokens: blocks, and the encoder built of them.

Tokens of all images lie end to end in one (T, D) tensor (see `masked_vit_kernels.packing`), so
every image keeps its own number of visible patches. Parameters carry the names of the released
checkpoints; their LayerNorms have eps 1e-6 (paper appendix A.1 names the sizes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from masked_vit_kernels import (
    Float8Rows,
    Packing,
    embed_visible_patches,
    float8_linear,
    gather_tokens,
    linear,
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


def residual_dtype(setting: str, weight: Tensor) -> torch.dtype:
    """Dtype of the residual stream beside weights of this dtype; `setting` as in `ModelConfig`.

    "fp32" keeps it at float32 or wider under autocast and beside bfloat16 weights, as the released
    code does; "bf16" lets it follow what the matrix products return.
    """
    if setting == "fp32":
        return torch.promote_types(weight.dtype, torch.float32)
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


@dataclass(frozen=True)
class KeptRows:
    """The rows of a packed tensor that the last block has to compute; the others only serve keys.

    Attributes:
        rows: (K,) int64 rows, sequence by sequence; -1 on padding.
        packing: as many sequences as the tensor has, `packing.capacity` = K, and its promise
            `unique` about `rows`.
    """

    rows: Tensor
    packing: Packing


@dataclass(frozen=True)
class RepeatedRows:
    """A packed tensor most of whose rows repeat: row t is `distinct[index[t]]`.

    Attributes:
        distinct: (U, D).
        index: (T,) int64, -1 on padding.
    """

    distinct: Tensor
    index: Tensor


class LayerNorm(nn.LayerNorm):
    """LayerNorm in the wider of the input's and the weights' dtypes, returned in the weights'."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        normed = F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps)
        return normed.to(self.weight.dtype)


class Linear(nn.Linear):
    """nn.Linear by the fastest product for its device.

    Attributes:
        float8: a copy of the weight that the optimiser keeps, or None.
    """

    float8: Float8Rows | None = None

    def forward(self, x: Tensor, float8: bool = False) -> Tensor:
        """(T, K) -> (T, N); by the float8 copy where asked for."""
        if float8:
            return float8_linear(x, self.float8_rows, self.bias)
        return linear(x, self.weight, self.bias)

    @property
    def float8_rows(self) -> Float8Rows:
        """The copy, which has to be there."""
        if self.float8 is None:
            raise RuntimeError("no float8 copy of this layer: `ijepa.train.optim` makes them")
        return self.float8


class Attention(nn.Module):
    """Multi-head self-attention within each packed sequence."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} cannot be shared among {heads} heads")
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(
        self, x: Tensor, packing: Packing, index: Tensor | None = None, float8: bool = False
    ) -> Tensor:
        """(T, D) -> (T, D); with `index` (T,), token t is row index[t] of `x`."""
        width = x.shape[1]
        qkv = self.qkv(x, float8)
        if index is not None:
            qkv = gather_tokens(qkv, index)
        tokens = qkv.shape[0]
        qkv = qkv.view(tokens, 3, self.heads, width // self.heads)
        mixed = varlen_attention_qkvpacked(
            qkv, packing.cu_seqlens, packing.max_seqlen, packing=packing
        )
        assert isinstance(mixed, Tensor)  # no LSE was asked for
        return self.proj(mixed.reshape(tokens, width), float8)

    def attend_from(
        self,
        kept: Tensor,
        kept_packing: Packing,
        x: Tensor,
        packing: Packing,
        float8: bool = False,
    ) -> Tensor:
        """Queries from `kept` (K, D), keys and values from `x` (T, D) -> (K, D)."""
        width = x.shape[1]
        split = (self.heads, width // self.heads)
        query_bias, key_value_bias = self.qkv.bias.split([width, 2 * width])
        if float8:
            rows = self.qkv.float8_rows
            query = float8_linear(kept, rows[:width], query_bias)
            key_value = float8_linear(x, rows[width:], key_value_bias)
        else:
            query_weight, key_value_weight = self.qkv.weight.split([width, 2 * width])
            query = linear(kept, query_weight, query_bias)
            key_value = linear(x, key_value_weight, key_value_bias)
        mixed = varlen_attention_kvpacked(
            query.view(-1, *split),
            key_value.view(-1, 2, *split),
            kept_packing.cu_seqlens,
            packing.cu_seqlens,
            kept_packing.max_seqlen,
            packing.max_seqlen,
            packing_q=kept_packing,
            packing_k=packing,
        )
        assert isinstance(mixed, Tensor)  # no LSE was asked for
        return self.proj(mixed.reshape(-1, width), float8)


class MLP(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor, float8: bool = False) -> Tensor:
        """(T, D) -> (T, D)."""
        return self.fc2(F.gelu(self.fc1(x, float8)), float8)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = MLP(width, round(width * mlp_ratio))

    def forward(
        self,
        x: Tensor,
        packing: Packing,
        kept: KeptRows | None = None,
        repeated: RepeatedRows | None = None,
        float8: bool = False,
    ) -> Tensor:
        """(T, D) -> (T, D), or only the `kept` rows of it -> (K, D).

        With `repeated`, which `x` must be equal to, queries, keys and values are computed once for
        every distinct row. With `float8`, products take the layers' float8 copies.
        """
        if repeated is not None and kept is None:
            x = x + self.attn(self.norm1(repeated.distinct), packing, repeated.index, float8)
        elif kept is None:
            x = x + self.attn(self.norm1(x), packing, float8=float8)
        else:
            residual = gather_tokens(x, kept.rows, kept.packing)  # (K, D)
            x = residual + self.attn.attend_from(
                self.norm1(residual), kept.packing, self.norm1(x), packing, float8
            )
        return x + self.mlp(self.norm2(x), float8)


def make_blocks(width: int, depth: int, heads: int, mlp_ratio: float) -> nn.ModuleList:
    """`depth` blocks of one size."""
    return nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))


def run_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    packing: Packing,
    *,
    kept: KeptRows | None = None,
    repeated: RepeatedRows | None = None,
    activation_checkpointing: bool = False,
    float8: bool = False,
) -> Tensor:
    """(T, D) through all blocks; with `kept`, the last one computes those rows alone -> (K, D).

    `repeated` describes `x` for the first block, see `Block.forward`.
    """
    recompute = activation_checkpointing and torch.is_grad_enabled()
    for index, block in enumerate(blocks):
        block_kept = kept if index == len(blocks) - 1 else None
        block_repeated = repeated if index == 0 else None
        if recompute:
            x = checkpoint(block, x, packing, block_kept, block_repeated, use_reentrant=False)
        else:
            x = block(x, packing, block_kept, block_repeated, float8)
    return x


@torch.no_grad()
def initialize(module: nn.Module, blocks: nn.ModuleList, init: str, rescale: bool) -> None:
    """Truncated normal weights, zero biases; in place.

    Args:
        init: std of linear weights, "released" (.02) or "fan_in" (1 / sqrt(inputs)).
        rescale: divide each block's two output weights by sqrt(2 * layer). The released code
            does so and then initialises once more, which undoes it.
    """
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Conv2d):
            std = INIT_STD
            if init == "fan_in" and isinstance(child, nn.Linear):
                std = 1 / math.sqrt(child.in_features)
            nn.init.trunc_normal_(child.weight, std=std)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
    if rescale:
        for layer, block in enumerate(blocks, start=1):
            assert isinstance(block, Block)
            block.attn.proj.weight.div_(math.sqrt(2.0 * layer))
            block.mlp.fc2.weight.div_(math.sqrt(2.0 * layer))


class PatchEmbed(nn.Module):
    """Holder of the patch embedding's weights under their released names (`proj.weight`, ...)."""

    def __init__(self, channels: int, width: int, patch_size: tuple[int, int]):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)


class Encoder(nn.Module):
    """ViT without a class token: images, or some of their patches, to features."""

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.grid = config.grid
        self.patch_size = config.patch_size
        # Buffers move to the device with the weights: a list would be copied there at every call.
        for name in ("image_mean", "image_std"):
            value = torch.tensor(getattr(config, name), dtype=torch.float32)
            self.register_buffer(name, value, persistent=False)
        self.residual = config.residual
        self.activation_checkpointing = config.activation_checkpointing
        self.patch_embed = PatchEmbed(config.channels, config.width, config.patch_size)
        self.pos_embed = nn.Parameter(
            sincos_positions(config.width, config.grid), requires_grad=False
        )
        self.blocks = make_blocks(config.width, config.depth, config.heads, config.mlp_ratio)
        self.norm = LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self._dense_packings: dict[tuple[int, int, torch.device], Packing] = {}
        initialize(self, self.blocks, config.init, config.rescale_init)
        nn.init.trunc_normal_(self.patch_embed.proj.weight, std=config.patch_init_std)

    def forward(
        self,
        images: Tensor,
        ids: Tensor | None = None,
        packing: Packing | None = None,
        *,
        kept: KeptRows | None = None,
        float8: bool = False,
    ) -> Tensor:
        """Features after the final norm.

        Args:
            images: (B, C, Hi, Wi), uint8 (normalised here with the config's mean and std) or
                floating point (taken as normalised). Sizes other than the config's are embedded
                with resized positions.
            ids: (T,) patch ids of `packing`'s sequences, -1 on padding; None takes every patch.
            packing: B * m sequences, those of image 0 first.
            kept: rows to compute in the last block, among the T (or B * N) tokens.
            float8: take the float8 copies of the blocks' weights; without gradients.

        Returns:
            (T, D) packed; (B, N, D) without ids; (K, D) with `kept`.
        """
        x, packing = self._embed(images, ids, packing)
        x = run_blocks(
            self.blocks, x, packing, kept=kept,
            activation_checkpointing=self.activation_checkpointing, float8=float8,
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
        if images.ndim != 4 or images.shape[1] != self.image_mean.shape[0]:
            raise ValueError(
                f"images must have shape (B, {self.image_mean.shape[0]}, H, W), "
                f"got {tuple(images.shape)}"
            )
        raw = images.dtype == torch.uint8
        if not (raw or images.is_floating_point()):
            raise ValueError(
                "images must be uint8, 0 to 255, or floating point and normalised, "
                f"got {images.dtype}"
            )
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
            packing = self.dense_packing(x.shape[0], x.shape[1], x.device)
        assert packing is not None  # ids come with their packing: embed_visible_patches checked
        return x.reshape(-1, x.shape[-1]).to(residual_dtype(self.residual, proj.weight)), packing

    def _positions(self, images: Tensor) -> Tensor:
        grid = (images.shape[2] // self.patch_size[0], images.shape[3] // self.patch_size[1])
        return (
            self.pos_embed
            if grid == self.grid
            else resize_positions(self.pos_embed, self.grid, grid)
        )

    def dense_packing(self, batch: int, tokens: int, device: torch.device) -> Packing:
        """B sequences of N tokens, built once for each shape.

        Call it before a traced forward pass without ids: it is made with numpy on the host.
        """
        key = (batch, tokens, device)
        if key not in self._dense_packings:
            self._dense_packings[key] = pack_lengths([tokens] * batch).to(device)
        return self._dense_packings[key]
