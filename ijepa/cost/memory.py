"""Bytes that a training step needs on a GPU: what lives through the run, and what an image adds."""

from __future__ import annotations

from ijepa.config import ModelConfig
from ijepa.cost.flops import TokenCounts

_RESIDUAL = 4  # bytes an element of the residual stream


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Trained parameters of an encoder and of the predictor; fixed positions are not counted."""
    pixels = config.channels * config.patch_size[0] * config.patch_size[1]
    width, narrow = config.width, config.predictor_width
    encoder = pixels * width + width + config.depth * block_parameters(width, config) + 2 * width
    predictor = (
        (width * narrow + narrow)
        + narrow
        + config.predictor_depth * block_parameters(narrow, config)
        + 2 * narrow
        + (narrow * config.target_width + config.target_width)
    )
    return {"encoder": encoder, "predictor": predictor}


def block_parameters(width: int, config: ModelConfig) -> int:
    """Of one transformer block of this width."""
    hidden = round(width * config.mlp_ratio)
    attention = 3 * width * width + 3 * width + width * width + width
    return attention + 2 * width * hidden + hidden + width + 4 * width


def state_bytes(parameters: dict[str, int], precision: str, target_precision: str = "same") -> int:
    """Bytes of what lives through the run.

    A trained parameter holds weight, gradient and Adam's two moments, 4 bytes each. The bf16 mode
    autocasts, and so keeps one bf16 copy of every weight alive through a step besides. With bf16
    parameters weight and gradient take 2 bytes each, beside a float32 master. Float8 copies of the
    target encoder's weights take 1.
    """
    float8 = parameters["encoder"] if target_precision == "fp8" else 0
    trained = parameters["encoder"] + parameters["predictor"]
    target = parameters["encoder"]
    if precision == "bf16-params":
        return 16 * trained + 6 * target + float8
    copies = 2 * (trained + target) if precision == "bf16" else 0
    return 16 * trained + 4 * target + copies + float8


def activation_bytes(config: ModelConfig, tokens: TokenCounts, precision: str) -> float:
    """Bytes that one image keeps for the backward pass: what each op saves, added up.

    A block saves for every token (in widths D): the inputs and outputs of both norms, q, k and v,
    the attention's output, and both sides of the GELU. With activation checkpointing it saves
    its input alone, and one block at a time the rest. Activations are bfloat16 in both bf16 modes,
    the residual stream and what enters a norm float32.
    """
    element = 4 if precision == "fp32" else 2
    context_block = _block_bytes(config, config.width, tokens.context, tokens.context, element)
    context = _all_blocks(config, config.width, config.depth, tokens.context, [context_block])
    width = config.predictor_width
    block = _block_bytes(config, width, tokens.predictor, tokens.predictor, element)
    last = block
    if config.prune_predictor:
        last = _block_bytes(config, width, tokens.predictor, tokens.targets, element)
    predictor = _all_blocks(config, width, config.predictor_depth, tokens.predictor, [block, last])
    pixels = config.channels * config.patch_size[0] * config.patch_size[1]
    ends = element * (
        tokens.context * (pixels + config.width)  # patches, the predictor's input
        + tokens.targets * (width + config.target_width)  # the last projection and the loss
    ) + _RESIDUAL * (tokens.context * config.width + tokens.targets * width)  # the last norms
    target_features = 4 * tokens.targets * config.target_width  # the loss keeps them, normalised
    return context + predictor + ends + target_features


def _block_bytes(
    config: ModelConfig, width: int, keys: float, queries: float, element: int
) -> float:
    """One block's; with fewer queries than keys it is a pruned one, which norms both."""
    hidden = round(width * config.mlp_ratio)
    block = queries * (2 * width * _RESIDUAL + (4 * width + 2 * hidden) * element)
    block += keys * 2 * width * element
    if queries < keys:
        block += keys * width * (_RESIDUAL + element)
    return block


def _all_blocks(
    config: ModelConfig, width: int, depth: int, tokens: float, kinds: list[float]
) -> float:
    """`depth` blocks, the last of which may be of another kind."""
    if config.activation_checkpointing:
        return depth * tokens * width * _RESIDUAL + max(kinds)
    return (depth - 1) * kinds[0] + kinds[-1]
