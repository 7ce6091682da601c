"""Stochastic depth: in training, an image skips a block's branches by chance."""

from __future__ import annotations

from masked_vit_kernels.packing import Packing
from torch import Tensor

from ijepa.vit import Block


def drop_path_chances(highest: float, depth: int) -> tuple[float, ...]:
    """The chance of each block, rising linearly from 0 to `highest` (timm's and MAE's rule).

    Raises:
        ValueError: a chance outside [0, 1).
    """
    if not 0 <= highest < 1:
        raise ValueError(f"drop_path must lie in [0, 1), got {highest}")
    return tuple(highest * place / max(depth - 1, 1) for place in range(depth))


def block_with_drop_path(
    block: Block, x: Tensor, packing: Packing, chance: float, tokens: int
) -> Tensor:
    """(B * N, D) -> (B * N, D): each branch is left out of an image by `chance`, and else divided
    by 1 - chance, so that its mean stays."""
    if chance == 0:
        return block(x, packing)
    x = x + _kept(x, chance, tokens) * block.attn(block.norm1(x), packing)
    return x + _kept(x, chance, tokens) * block.mlp(block.norm2(x))


def _kept(x: Tensor, chance: float, tokens: int) -> Tensor:
    """(B * N, 1): 1 / (1 - chance) or 0, the same for all tokens of an image."""
    images = x.shape[0] // tokens
    kept = x.new_empty(images, 1).bernoulli_(1 - chance) / (1 - chance)
    return kept.repeat_interleave(tokens, dim=0)
