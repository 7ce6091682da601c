"""I-JEPA written out one image and one block at a time, with dense attention: the model's oracle.

Reads a model's parameters by name and shares none of its code.
"""

import torch
import torch.nn.functional as F


def block(x, get, heads):
    """(n, D) -> (n, D); `get(name)` returns the block's parameter."""
    count, width = x.shape
    h = F.layer_norm(x, (width,), get("norm1.weight"), get("norm1.bias"), 1e-6)
    qkv = h @ get("attn.qkv.weight").T + get("attn.qkv.bias")
    q, k, v = qkv.view(count, 3, heads, width // heads).permute(1, 2, 0, 3)  # (H, n, Dh)
    weights = (q @ k.transpose(1, 2) / (width // heads) ** 0.5).softmax(-1)
    mixed = (weights @ v).transpose(0, 1).reshape(count, width)
    x = x + mixed @ get("attn.proj.weight").T + get("attn.proj.bias")
    h = F.layer_norm(x, (width,), get("norm2.weight"), get("norm2.bias"), 1e-6)
    h = F.gelu(h @ get("mlp.fc1.weight").T + get("mlp.fc1.bias"))
    return x + h @ get("mlp.fc2.weight").T + get("mlp.fc2.bias")


def run(x, parameters, blocks, norm, heads):
    """All blocks and the final norm."""
    depth = len({name.split(".")[1] for name in parameters if name.startswith(f"{blocks}.")})
    for i in range(depth):
        x = block(x, lambda name, i=i: parameters[f"{blocks}.{i}.{name}"], heads)
    width = x.shape[1]
    return F.layer_norm(x, (width,), parameters[f"{norm}.weight"], parameters[f"{norm}.bias"], 1e-6)


def encode(encoder, heads, image, ids):
    """(C, Hi, Wi) and (n,) patch ids -> (n, D)."""
    parameters = dict(encoder.named_parameters())
    weight = parameters["patch_embed.proj.weight"]
    tokens = F.conv2d(image[None], weight, parameters["patch_embed.proj.bias"], weight.shape[2:])
    tokens = tokens.flatten(2)[0].T + parameters["pos_embed"][0]
    return run(tokens[ids], parameters, "blocks", "norm", heads)


def predict(predictor, heads, context, context_ids, target_ids):
    """Context features (n, D) -> predictions (k, D) of one block."""
    parameters = dict(predictor.named_parameters())
    position = parameters["predictor_pos_embed"][0]
    x = context @ parameters["predictor_embed.weight"].T + parameters["predictor_embed.bias"]
    asked = parameters["mask_token"][0, 0] + position[target_ids]
    x = torch.cat([x + position[context_ids], asked])
    x = run(x, parameters, "predictor_blocks", "predictor_norm", heads)[len(context_ids) :]
    return x @ parameters["predictor_proj.weight"].T + parameters["predictor_proj.bias"]


def patch_pixels(image, patch_size):
    """(C, Hi, Wi) -> (N, C * ph * pw)."""
    return F.unfold(image[None], patch_size, stride=patch_size)[0].T


def loss(model, images, context, targets):
    """The training loss; `context[b]` and `targets[b][m]` are id tensors."""
    config = model.config
    total, count = 0.0, 0
    for image, context_ids, image_blocks in zip(images, context, targets, strict=True):
        seen = encode(model.context_encoder, config.heads, image, context_ids)
        everything = torch.arange(config.num_patches)
        for ids in image_blocks:
            prediction = predict(
                model.predictor, config.predictor_heads, seen, context_ids, ids
            )
            with torch.no_grad():
                if config.target_masking == "input":
                    wanted = encode(model.target_encoder, config.heads, image, ids)
                else:
                    if config.target == "pixels":
                        features = patch_pixels(image, config.patch_size)
                    else:
                        features = encode(model.target_encoder, config.heads, image, everything)
                    if config.target_norm == "instance":
                        features = F.instance_norm(features.T[None])[0].T
                    wanted = features[ids]
                if config.target_norm == "layer":
                    wanted = F.layer_norm(wanted, wanted.shape[1:])
            distance = F.smooth_l1_loss if config.loss == "smooth_l1" else F.mse_loss
            total = total + distance(prediction, wanted, reduction="sum")
            count += prediction.numel()
    return total / max(count, 1)
