"""The network that fine-tuning begins with: an encoder at its size, and a new head."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from ijepa.data.views import Transform
from ijepa.evaluate.pretrained import PretrainedEncoder
from ijepa.positions import resize_positions

_HEAD_STD = 2e-5  # MAE's


def classifier_from(
    encoder: PretrainedEncoder, class_names: Sequence[str], transform: Transform, seed: int
) -> PretrainedEncoder:
    """A copy of an encoder with a head for these classes, to be trained.

    Positions are resized to the transform's size and stay fixed; everything else is trained. The
    head begins close to zero, normal with std 2e-5.
    """
    size = transform.size
    encoder.check_size(size)
    config = dataclasses.replace(encoder.config, image_size=size)
    state = {
        name: tensor.detach().cpu().clone()
        for name, tensor in encoder.state_dict().items()
        if not name.startswith("head.")
    }
    state["pos_embed"] = resize_positions(state["pos_embed"], encoder.grid, config.grid)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(len(class_names), config.width)
    state["head.weight"] = nn.init.trunc_normal_(weight, std=_HEAD_STD, generator=generator)
    state["head.bias"] = torch.zeros(len(class_names))
    classifier = PretrainedEncoder(config, state, transform, class_names)
    for name, parameter in classifier.named_parameters():
        parameter.requires_grad_(name != "pos_embed")
    return classifier.to(encoder.pos_embed.device)
