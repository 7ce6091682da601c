"""Parameter groups whose learning rates shrink towards the input (Clark et al., 2020; MAE).

Of L blocks, layer 0 is the patch embedding, layer i block i, layer L + 1 the final norm and the
head. A layer's learning rate is decay^(L + 1 - layer) times the head's.
"""

from __future__ import annotations

from torch import Tensor, nn


def layer_of(name: str, depth: int) -> int:
    """The layer of an encoder's parameter by its released name."""
    if name.startswith(("patch_embed.", "pos_embed")):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def decayed_groups(
    network: nn.Module, depth: int, decay: float, weight_decay: float
) -> list[dict[str, object]]:
    """Groups for AdamW, each with its "lr_scale"; biases and norms have no weight decay."""
    groups: dict[tuple[int, bool], list[Tensor]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            key = layer_of(name, depth), parameter.ndim > 1
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr_scale": decay ** (depth + 1 - layer),
            "weight_decay": weight_decay if is_weight else 0.0,
        }
        for (layer, is_weight), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
