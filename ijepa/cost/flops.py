"""Floating-point operations of one training step, part by part.

Counted as everyone counts them: a multiply and an add are two operations, matrix products only,
and nothing that is computed twice on purpose (recomputed softmax, activation checkpointing).
A linear layer's backward costs twice its forward; the patch embedding's only once, since pixels
need no gradient. The attention over a sequence of n queries and m keys costs 4 n m D forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ijepa.config import ModelConfig, Recipe
from ijepa.counter_rng import derive_keys
from ijepa.masks.batch import MaskBatch
from ijepa.masks.from_config import build_mask_sampler

_SAMPLE_IMAGES, _SAMPLE_BATCHES = 512, 64


@dataclass(frozen=True)
class TokenCounts:
    """Means over images of the lengths a step works on. "pairs" are queries times keys.

    Attributes:
        images: images of a batch, whose predictor may share inputs (`share_predictor`).
        context, targets, union, predictor: tokens of an image; targets counts overlaps.
        context_pairs, target_pairs, predictor_pairs: of self-attention.
        pruned_predictor_pairs: the last block's, where only target rows are queries.
    """

    images: int
    context: float
    targets: float
    union: float
    predictor: float
    context_pairs: float
    target_pairs: float
    predictor_pairs: float
    pruned_predictor_pairs: float


@dataclass(frozen=True)
class Flops:
    """Operations of an image: forward, and forward plus backward."""

    forward: float
    total: float


def count_tokens(masks: MaskBatch) -> TokenCounts:
    """Lengths of one batch's sequences; a stable mean takes a few hundred images."""
    images = masks.batch_size
    context = np.diff(masks.context_packing.cu_seqlens.numpy()).astype(np.float64)
    targets = np.diff(masks.target_packing.cu_seqlens.numpy()).astype(np.float64)
    predictor = np.diff(masks.predictor_packing.cu_seqlens.numpy()).astype(np.float64)
    return TokenCounts(
        images=images,
        context=context.sum() / images,
        targets=targets.sum() / images,
        union=float(masks.target_union_packing.cu_seqlens[-1]) / images,
        predictor=predictor.sum() / images,
        context_pairs=(context**2).sum() / images,
        target_pairs=(targets**2).sum() / images,
        predictor_pairs=(predictor**2).sum() / images,
        pruned_predictor_pairs=(targets * predictor).sum() / images,
    )


def mean_counts(batches: Sequence[TokenCounts]) -> TokenCounts:
    """Means over batches of one size."""
    sizes = {batch.images for batch in batches}
    if len(sizes) != 1:
        raise ValueError(f"batches must be of one size, got {sorted(sizes)}")
    columns = zip(*(dataclasses.astuple(batch) for batch in batches), strict=True)
    images, *lengths = (float(np.mean(column)) for column in columns)
    return TokenCounts(int(images), *lengths)


def flops_per_image(recipe: Recipe, micro_batch: int) -> float:
    """Operations an image costs in a step of this recipe."""
    return total_flops(step_flops(recipe.model, sample_tokens(recipe, micro_batch)))


def sample_tokens(recipe: Recipe, micro_batch: int) -> TokenCounts:
    """Mean lengths of the recipe's masks, over at least 512 images.

    They are drawn in batches of the run's own size: truncated masks depend on it, and share one
    block size a batch, so that their means take many batches.
    """
    cpu = torch.device("cpu")
    sampler = build_mask_sampler(recipe.masks, recipe.model.grid, micro_batch, cpu)
    batches = max(-(-_SAMPLE_IMAGES // micro_batch), _SAMPLE_BATCHES * sampler.couples_batch)
    keys = derive_keys(0, np.arange(batches * micro_batch)).reshape(batches, micro_batch)
    return mean_counts([count_tokens(sampler(keys=batch)) for batch in keys])


def total_flops(flops: dict[str, Flops]) -> float:
    """Of the whole step, with backward."""
    return sum(part.total for part in flops.values())


def target_products(config: ModelConfig, tokens: TokenCounts) -> float:
    """Operations of the target encoder's linear layers for an image: what float8 speeds up."""
    if config.target == "pixels":
        return 0.0
    if config.target_masking == "input":
        return config.depth * _block(config, tokens.targets, 0.0)
    patches = config.num_patches
    last = tokens.union if config.prune_target else patches
    return (config.depth - 1) * _block(config, patches, 0.0) + _pruned_block(
        config, patches, last, 0.0
    )


def step_flops(config: ModelConfig, tokens: TokenCounts) -> dict[str, Flops]:
    """Operations an image costs in a step: keys "target", "context" and "predictor"."""
    context_embed = _embedding(config, tokens.context)
    context_blocks = config.depth * _block(config, tokens.context, tokens.context_pairs)
    width = config.predictor_width
    predictor = (
        2 * tokens.context * config.width * width
        + _predictor_blocks(config, tokens)
        + 2 * tokens.targets * width * config.target_width
    )
    return {
        "target": _target(config, tokens),
        "context": Flops(context_embed + context_blocks, 2 * context_embed + 3 * context_blocks),
        "predictor": Flops(predictor, 3 * predictor),
    }


def _target(config: ModelConfig, tokens: TokenCounts) -> Flops:
    """The target encoder's forward; nothing for pixel targets."""
    if config.target == "pixels":
        return Flops(0.0, 0.0)
    if config.target_masking == "input":
        forward = _embedding(config, tokens.targets) + config.depth * _block(
            config, tokens.targets, tokens.target_pairs
        )
        return Flops(forward, forward)
    patches = config.num_patches
    forward = _embedding(config, patches) + (config.depth - 1) * _block(config, patches, patches**2)
    if config.prunes_target:
        forward += _pruned_block(config, patches, tokens.union, tokens.union * patches)
    else:
        forward += _block(config, patches, patches**2)
    return Flops(forward, forward)


def _predictor_blocks(config: ModelConfig, tokens: TokenCounts) -> float:
    width, depth = config.predictor_width, config.predictor_depth
    full = _block(config, tokens.predictor, tokens.predictor_pairs, width)
    blocks = [full] * depth
    if config.prune_predictor:
        blocks[-1] = _pruned_block(
            config, tokens.predictor, tokens.targets, tokens.pruned_predictor_pairs, width
        )
    if config.share_predictor and (depth > 1 or not config.prune_predictor):
        distinct = tokens.context + config.num_patches / tokens.images
        blocks[0] -= (tokens.predictor - distinct) * 2 * 3 * width * width
    return sum(blocks)


def _embedding(config: ModelConfig, tokens: float) -> float:
    """Forward of the patch embedding."""
    pixels = config.channels * config.patch_size[0] * config.patch_size[1]
    return 2 * tokens * pixels * config.width


def _block(config: ModelConfig, tokens: float, pairs: float, width: int | None = None) -> float:
    """Forward of one transformer block."""
    return _pruned_block(config, tokens, tokens, pairs, width)


def _pruned_block(
    config: ModelConfig, keys: float, queries: float, pairs: float, width: int | None = None
) -> float:
    """Forward of a block whose keys and values come from all tokens, all else from `queries`."""
    width = config.width if width is None else width
    hidden = round(width * config.mlp_ratio)
    per_query = 2 * (2 * width * width + 2 * width * hidden)  # query, projection, MLP
    per_key = 2 * 2 * width * width  # key and value
    return queries * per_query + keys * per_key + 4 * pairs * width
