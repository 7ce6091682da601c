"""What a recipe will need before it is started: operations, memory, time.

Every figure is arithmetic on the recipe; the one thing that has to be believed is the MFU (the
share of the GPU's dense matmul rate that the step reaches), which is stated with the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from rich.table import Table

from ijepa.config import ModelConfig, Recipe
from ijepa.cost.flops import Flops, TokenCounts, count_tokens, mean_counts, step_flops
from ijepa.counter_rng import derive_keys
from ijepa.masks.from_config import build_mask_sampler
from ijepa.recipes import check_known
from ijepa.train.from_recipe import micro_batch_size

DEFAULT_MFU = 0.5
IMAGENET_IMAGES = 1_281_167  # what a recipe of a folder without a number of images is planned for
_GIB = 2**30
_RESIDUAL = 4  # bytes an element of the residual stream
_RESERVED = 0.08  # share of memory left to the context, the allocator and workspaces
_SAMPLE_IMAGES, _SAMPLE_BATCHES = 512, 64


@dataclass(frozen=True)
class Gpu:
    """Datasheet values: memory in GiB, dense bf16 matmul rate in TFLOP/s."""

    label: str
    memory: float
    teraflops: float


GPUS = {
    "a100": Gpu("A100 80 GB", 80, 312),
    "a100-40": Gpu("A100 40 GB", 40, 312),
    "h100": Gpu("H100 SXM", 80, 989),
    "h200": Gpu("H200", 141, 989),
    "b200": Gpu("B200", 180, 2250),
    "l40s": Gpu("L40S", 48, 362),
    "rtx4090": Gpu("RTX 4090", 24, 165),
}


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        flops: operations of an image by part of the step.
        parameters: of each network.
        state_bytes: weights, gradients, optimiser and target encoder, on every GPU.
        image_bytes: activations that one image keeps for the backward pass.
        largest_batch: images of one micro-batch that fit a GPU, 0 where not one does.
        images_per_second: of all GPUs.
        seconds: of the whole run.
        mfu: share of the GPU's datasheet rate the times assume.
        micro_batch: images of a GPU's forward pass, as the recipe has it.
    """

    recipe: Recipe
    gpu: Gpu
    gpus: int
    mfu: float
    micro_batch: int
    flops: dict[str, Flops]
    parameters: dict[str, int]
    state_bytes: int
    image_bytes: float
    largest_batch: int
    images_per_second: float
    images: float
    seconds: float


def plan_recipe(
    recipe: Recipe,
    *,
    gpu: str,
    gpus: int | None = None,
    mfu: float | None = None,
    num_images: int | None = None,
) -> Plan:
    """Plan a run of `recipe`.

    Args:
        gpu: a key of `GPUS`.
        gpus: data-parallel GPUs, default 8.
        mfu: 0 to 1, default 0.5.
        num_images: of the training set, where the recipe counts epochs. Default: the recipe's own
            for rendered images, else ImageNet-1k's.

    Raises:
        ValueError: an unknown GPU (lists the known ones), a figure out of its range, or a batch
            that the GPUs cannot share.
    """
    check_known([gpu.lower()], list(GPUS), "unknown GPU")
    device = GPUS[gpu.lower()]
    gpus = 8 if gpus is None else gpus
    mfu = DEFAULT_MFU if mfu is None else mfu
    if num_images is None:
        rendered = recipe.data.source != "folder"
        num_images = recipe.data.num_images if rendered else IMAGENET_IMAGES
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {gpus}")
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu must lie in (0, 1], got {mfu}")
    config = recipe.model
    micro_batch = micro_batch_size(recipe, gpus)
    tokens = sample_tokens(recipe, micro_batch)
    flops = step_flops(config, tokens)
    parameters = count_parameters(config)
    state = state_bytes(parameters, recipe.train.precision)
    image = activation_bytes(config, tokens, recipe.train.precision)
    room = device.memory * _GIB * (1 - _RESERVED) - state
    rate = gpus * device.teraflops * 1e12 * mfu / _total(flops)
    steps = recipe.in_steps(num_images).train.steps
    assert steps is not None  # in_steps fills it in
    images = float(steps) * recipe.train.batch_size
    return Plan(
        recipe=recipe,
        gpu=device,
        gpus=gpus,
        mfu=mfu,
        micro_batch=micro_batch,
        flops=flops,
        parameters=parameters,
        state_bytes=state,
        image_bytes=image,
        largest_batch=max(int(room // image), 0),
        images_per_second=rate,
        images=images,
        seconds=images / rate,
    )


def flops_per_image(recipe: Recipe, micro_batch: int) -> float:
    """Operations an image costs in a step of this recipe."""
    return _total(step_flops(recipe.model, sample_tokens(recipe, micro_batch)))


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


def _total(flops: dict[str, Flops]) -> float:
    return sum(part.total for part in flops.values())


def known_gpu(device_name: str) -> Gpu | None:
    """The entry of `GPUS` for a name as the driver gives it, "NVIDIA H100 80GB HBM3"."""
    name = device_name.lower().replace(" ", "")
    if "a100" in name:
        return GPUS["a100-40" if "40gb" in name else "a100"]
    return next((gpu for key, gpu in GPUS.items() if key in name), None)


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Trained parameters of an encoder and of the predictor; fixed positions are not counted."""
    pixels = config.channels * config.patch_size[0] * config.patch_size[1]
    width, narrow = config.width, config.predictor_width
    encoder = pixels * width + width + config.depth * _block_parameters(width, config) + 2 * width
    predictor = (
        (width * narrow + narrow)
        + narrow
        + config.predictor_depth * _block_parameters(narrow, config)
        + 2 * narrow
        + (narrow * config.target_width + config.target_width)
    )
    return {"encoder": encoder, "predictor": predictor}


def _block_parameters(width: int, config: ModelConfig) -> int:
    hidden = round(width * config.mlp_ratio)
    attention = 3 * width * width + 3 * width + width * width + width
    return attention + 2 * width * hidden + hidden + width + 4 * width


def state_bytes(parameters: dict[str, int], precision: str) -> int:
    """Bytes of what lives through the run.

    A trained parameter holds weight, gradient and Adam's two moments, 4 bytes each. The bf16 mode
    autocasts, and so keeps one bf16 copy of every weight alive through a step besides. With bf16
    parameters weight and gradient take 2 bytes each, beside a float32 master.
    """
    trained = parameters["encoder"] + parameters["predictor"]
    target = parameters["encoder"]
    if precision == "bf16-params":
        return 16 * trained + 6 * target
    copies = 2 * (trained + target) if precision == "bf16" else 0
    return 16 * trained + 4 * target + copies


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


def render_plan(plan: Plan) -> Table:
    """The plan as a table for the terminal."""
    config = plan.recipe.model
    table = Table(title=f"{plan.recipe.name} on {plan.gpus} x {plan.gpu.label}", show_header=False)
    table.add_column("what")
    table.add_column("figure", justify="right")
    for part, flops in plan.flops.items():
        table.add_row(
            f"{part}, forward / with backward",
            f"{flops.forward / 1e9:,.1f} / {flops.total / 1e9:,.1f} GFLOP an image",
        )
    table.add_row("whole step", f"{_total(plan.flops) / 1e9:,.1f} GFLOP an image")
    table.add_row(
        "parameters",
        f"encoder {plan.parameters['encoder'] / 1e6:,.1f} M, "
        f"predictor {plan.parameters['predictor'] / 1e6:,.1f} M",
    )
    table.add_section()
    table.add_row("weights, gradients, optimiser", f"{plan.state_bytes / _GIB:,.1f} GiB a GPU")
    checkpointed = ", checkpointed" if config.activation_checkpointing else ""
    table.add_row(f"activations{checkpointed}", f"{plan.image_bytes / 2**20:,.1f} MiB an image")
    table.add_row("largest micro-batch that fits", f"{plan.largest_batch:,} images a GPU")
    table.add_row("the recipe's micro-batch", f"{plan.micro_batch:,} images a GPU")
    table.add_section()
    table.add_row(
        f"speed at {plan.mfu:.0%} MFU of {plan.gpu.teraflops:,.0f} TFLOP/s",
        f"{plan.images_per_second:,.0f} images/s",
    )
    table.add_row("images seen", f"{plan.images / 1e6:,.1f} M")
    hours = plan.seconds / 3600
    table.add_row("time", f"{hours:,.1f} hours = {hours / 24:,.2f} days")
    table.add_row("GPU-hours", f"{hours * plan.gpus:,.0f}")
    return table
