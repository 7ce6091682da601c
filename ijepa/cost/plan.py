"""What a recipe will need before it is started: operations, memory, time.

Every figure is arithmetic on the recipe; the one thing that has to be believed is the MFU (the
share of the GPU's dense matmul rate that the step reaches), which is stated with the result.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from ijepa.config import Recipe
from ijepa.cost.flops import (
    Flops,
    TokenCounts,
    sample_tokens,
    step_flops,
    target_products,
    total_flops,
)
from ijepa.cost.gpus import GPUS, Gpu
from ijepa.cost.memory import (
    activation_bytes,
    block_parameters,
    count_parameters,
    state_bytes,
)
from ijepa.cost.scaling import Networks, Point, scaling
from ijepa.recipes import check_known

DEFAULT_MFU = 0.5
IMAGENET_IMAGES = 1_281_167  # what a recipe of a folder without a number of images is planned for
_GIB = 2**30
_RESERVED = 0.08  # share of memory left to the context, the allocator and workspaces


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        flops: operations of an image by part of the step.
        float8_flops: those of them that run in float8.
        parameters: of each network.
        state_bytes: weights, gradients, optimiser and target encoder, on every GPU.
        image_bytes: activations that one image keeps for the backward pass.
        largest_batch: images of one micro-batch that fit a GPU, 0 where not one does.
        images_per_second: of all GPUs.
        seconds: of the whole run, sending left out.
        room: bytes of a GPU's memory that can be used.
        points: the step on one GPU to `gpus`, sending counted.
        mfu: share of the GPU's datasheet rate the times assume.
        micro_batch: images of a GPU's forward pass, as the recipe has it.
    """

    recipe: Recipe
    gpu: Gpu
    gpus: int
    mfu: float
    micro_batch: int
    flops: dict[str, Flops]
    float8_flops: float
    parameters: dict[str, int]
    state_bytes: int
    image_bytes: float
    largest_batch: int
    images_per_second: float
    images: float
    seconds: float
    room: float
    points: list[Point]


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
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {gpus}")
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu must lie in (0, 1], got {mfu}")
    config = recipe.model
    micro_batch = recipe.micro_batch_size(gpus)
    tokens = sample_tokens(recipe, micro_batch)
    flops = step_flops(config, tokens)
    parameters = count_parameters(config)
    state = state_bytes(parameters, recipe.train.precision, recipe.train.target_precision)
    image = activation_bytes(config, tokens, recipe.train.precision)
    usable = device.memory * _GIB * (1 - _RESERVED)
    room = usable - state
    in_float8 = _in_float8(recipe, device, tokens)
    cost = total_flops(flops) - in_float8 * (1 - device.teraflops / (device.float8_teraflops or 1))
    rate = gpus * device.teraflops * 1e12 * mfu / cost
    images = float(recipe.in_steps(num_images).train.num_steps) * recipe.train.batch_size
    return Plan(
        recipe=recipe,
        gpu=device,
        gpus=gpus,
        mfu=mfu,
        micro_batch=micro_batch,
        flops=flops,
        float8_flops=in_float8,
        parameters=parameters,
        state_bytes=state,
        image_bytes=image,
        largest_batch=max(int(room // image), 0),
        images_per_second=rate,
        images=images,
        seconds=images / rate,
        room=usable,
        points=scaling(
            recipe,
            Networks(
                trained=sum(parameters.values()),
                averaged=parameters["encoder"],
                blocks=2 * config.depth + config.predictor_depth,
                state_bytes=state,
                image_bytes=image,
                largest_unit=block_parameters(config.width, config),
            ),
            flops,
            gpu=device,
            gpus=gpus,
            mfu=mfu,
            room=usable,
        ),
    )


def _in_float8(recipe: Recipe, device: Gpu, tokens: TokenCounts) -> float:
    """Operations of an image in float8; ValueError where the GPU has no such products."""
    if recipe.train.target_precision != "fp8":
        return 0.0
    if device.float8_teraflops is None:
        able = ", ".join(key for key, gpu in GPUS.items() if gpu.float8_teraflops)
        raise ValueError(
            f'train.target_precision = "fp8", but an {device.label} multiplies no float8: plan for '
            f'one of {able}, or with train.target_precision = "same"'
        )
    return target_products(recipe.model, tokens)


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
    table.add_row("whole step", f"{total_flops(plan.flops) / 1e9:,.1f} GFLOP an image")
    if plan.float8_flops:
        table.add_row("of it in float8", f"{plan.float8_flops / 1e9:,.1f} GFLOP an image")
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
    rate = plan.points[-1].images_per_second(plan.recipe.train.batch_size)
    if plan.gpus > 1 and rate is not None:
        hours = plan.images / rate / 3600
        table.add_row("time, sending counted", f"{hours:,.1f} hours = {hours / 24:,.2f} days")
    return table
