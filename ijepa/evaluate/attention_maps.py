"""Where the patches of an image look: attention weights of one block, in plain PyTorch.

The ops compute attention without ever holding its weights; here they are wanted, for few images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ijepa.vit import Block, Encoder


@torch.no_grad()
def attention_weights(encoder: Encoder, images: Tensor, block: int = -1) -> Tensor:
    """Softmax weights of a block's self-attention over all patches.

    Args:
        images: (B, C, Hi, Wi) uint8 or normalised, on the encoder's device.
        block: number of the block, counted from the end where negative.

    Returns:
        (B, H, N, N) float32: [b, h, i, j] is how much patch i takes of patch j; rows sum to one.

    Raises:
        ValueError: no such block.
    """
    depth = len(encoder.blocks)
    if not -depth <= block < depth:
        raise ValueError(f"block must be in {-depth} to {depth - 1}, got {block}")
    chosen = encoder.blocks[block]
    assert isinstance(chosen, Block)
    taken: list[Tensor] = []
    handle = chosen.attn.qkv.register_forward_hook(lambda _module, _given, out: taken.append(out))
    try:
        encoder(images)
    finally:
        handle.remove()
    batch, heads = images.shape[0], chosen.attn.heads
    qkv = taken[0].float().view(batch, -1, 3, heads, taken[0].shape[1] // (3 * heads))
    query, key = (qkv[:, :, part].transpose(1, 2) for part in (0, 1))  # (B, H, N, d)
    return (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(dim=-1)
