"""Networks whose weights will all come from a file."""

from __future__ import annotations

import torch

from ijepa.config import ModelConfig
from ijepa.model import IJEPA


def networks_without_weights(config: ModelConfig) -> IJEPA:
    """The three networks with nothing initialised; only what no file holds is there."""
    with torch.device("meta"):
        model = IJEPA(config)
    for encoder in (model.context_encoder, model.target_encoder):
        for name in ("image_mean", "image_std"):
            setattr(encoder, name, torch.tensor(getattr(config, name), dtype=torch.float32))
    return model
