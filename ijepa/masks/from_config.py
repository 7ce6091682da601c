"""The mask sampler of a recipe."""

from __future__ import annotations

import torch
from masked_vit_kernels.packing import TILE

from ijepa.config import MaskConfig
from ijepa.masks.capacities import plan_capacities
from ijepa.masks.multiblock import MultiBlockSampler
from ijepa.masks.sampler import MaskSampler
from ijepa.masks.strategies import BlockSampler, RandomSampler, RasterizedSampler


def build_mask_sampler(
    config: MaskConfig, grid: tuple[int, int], batch_size: int, device: torch.device
) -> MaskSampler:
    """The sampler of a recipe, with few shapes: planned capacities on a GPU, whole tiles on a CPU
    (whose library compiles a matrix product at its first use, in milliseconds).

    Raises:
        ValueError: settings that cannot be satisfied, with the nearest that can.
    """
    arguments: dict = {}
    kind: type[MaskSampler]
    if config.strategy == "multiblock":
        kind = MultiBlockSampler
        arguments = {
            "context_scale": config.context_scale,
            "target_scale": config.target_scale,
            "target_aspect": config.target_aspect,
            "num_targets": config.num_targets,
            "min_context": config.min_context,
            "batching": config.batching,
        }
    elif config.strategy == "rasterized":
        kind = RasterizedSampler
    elif config.strategy == "block":
        kind = BlockSampler
        arguments = {"scale": config.target_share, "aspect": config.target_aspect}
    else:
        kind = RandomSampler
        arguments = {"scale": config.target_share}
    if device.type == "cpu":
        return kind(grid, **arguments, capacities=TILE)
    sampler = kind(grid, **arguments)
    sampler.capacities = plan_capacities(sampler, batch_size)
    return sampler
