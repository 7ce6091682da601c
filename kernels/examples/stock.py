"""The same four losses, of the same weights, with nothing but PyTorch: what the ops are held to.

Written as such code is written: dense batches, `torch.gather`, `F.scaled_dot_product_attention`.
Every image of a batch has to hide as many patches as the others.
"""

from __future__ import annotations

import data2vec as data2vec_example
import dinov2 as dinov2_example
import mae as mae_example
import torch
import torch.nn.functional as F
import vjepa as vjepa_example
from packed_vit import Blocks, Patches
from torch import Tensor


def embed(patches: Patches, images: Tensor, positions: Tensor | None) -> Tensor:
    """(B, N, D)."""
    convolution = F.conv2d if images.ndim == 4 else F.conv3d
    stride = tuple(patches.weight.shape[2:])
    x = convolution(images, patches.weight, patches.bias, stride=stride).flatten(2).transpose(1, 2)
    return x if positions is None else x + positions


def run_blocks(blocks: Blocks, x: Tensor, last: int = 0) -> Tensor:
    """(B, N, D); with `last`, the mean of so many blocks' outputs, without the last norm."""
    outputs = []
    for block in blocks.blocks:
        q, k, v = block.qkv(block.norm1(x)).unflatten(2, (3, block.heads, -1)).unbind(2)
        mixed = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)))
        x = x + block.proj(mixed.transpose(1, 2).flatten(2))
        x = x + block.fc2(F.gelu(block.fc1(block.norm2(x))))
        outputs.append(x)
    return torch.stack(outputs[-last:]).mean(0) if last else blocks.norm(x)


def take(x: Tensor, ids: Tensor) -> Tensor:
    """(B, N, D) by (B, K) -> (B, K, D)."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[2]))


def put(x: Tensor, ids: Tensor, fill: Tensor, num_tokens: int) -> Tensor:
    """(B, K, D) back among N copies of `fill`."""
    whole = fill.to(x.dtype).expand(x.shape[0], num_tokens, x.shape[2])
    return whole.scatter(1, ids[..., None].expand_as(x), x)


def with_class_token(token: Tensor, x: Tensor) -> Tensor:
    """(B, N, D) -> (B, 1 + N, D)."""
    return torch.cat([token.to(x.dtype).expand(x.shape[0], 1, x.shape[2]), x], dim=1)


def mae(model: mae_example.MAE, images: Tensor, masking: mae_example.Masking) -> Tensor:
    """`MAE.forward`."""
    x = take(embed(model.patches, images, model.patches.positions), masking.ids_keep)
    x = model.to_decoder(run_blocks(model.encoder, with_class_token(model.class_token, x)))
    class_token, x = x[:, :1], x[:, 1:]
    x = put(x, masking.ids_keep, model.mask_token, mae_example.NUM_TOKENS)
    x = torch.cat([class_token, x + model.decoder_positions], dim=1)
    x = run_blocks(model.decoder, x)[:, 1:].flatten(0, 1)
    predictions = model.predict(x[masking.masked])
    patch = mae_example.PATCH
    pixels = F.unfold(images.float(), patch, stride=patch).transpose(1, 2).flatten(0, 1)
    targets = F.layer_norm(pixels[masking.masked], pixels.shape[-1:])
    return F.mse_loss(predictions.float(), targets)


def data2vec(
    model: data2vec_example.Data2Vec, images: Tensor, masking: data2vec_example.Masking
) -> Tensor:
    """`Data2Vec.forward`."""
    student, teacher = model.student, model.teacher
    x = take(embed(student.patches, images, None), masking.visible)
    x = put(x, masking.visible, student.mask_token, data2vec_example.NUM_TOKENS)
    x = run_blocks(student.blocks, x + student.patches.positions).flatten(0, 1)
    with torch.no_grad():
        targets = embed(teacher.patches, images, teacher.patches.positions)
        targets = run_blocks(teacher.blocks, targets, last=data2vec_example.TOP_BLOCKS).float()
        targets = F.instance_norm(targets.transpose(1, 2)).transpose(1, 2).flatten(0, 1)
    predictions = model.predict(x[masking.masked])
    return F.smooth_l1_loss(predictions.float(), targets[masking.masked])


def dinov2(
    model: dinov2_example.DINOv2, large: Tensor, small: Tensor, masking: dinov2_example.Masking
) -> tuple[Tensor, Tensor]:
    """`DINOv2.forward`."""

    def run(network: dinov2_example.Network, x: Tensor) -> Tensor:
        return run_blocks(network.blocks, with_class_token(network.class_token, x))

    student, teacher = model.student, model.teacher
    positions = student.patches.positions
    x = take(embed(student.patches, large, None), masking.visible)
    x = put(x, masking.visible, student.mask_token, dinov2_example.NUM_TOKENS) + positions
    of_large = run(student, x)
    of_small = run(student, embed(student.patches, small, student.positions(small.shape[-1])))
    by_crop = student.head(torch.cat([of_large[:, 0], of_small[:, 0]]))
    by_patch = student.head(of_large[:, 1:].flatten(0, 1)[masking.masked])
    with torch.no_grad():
        seen = run(teacher, embed(teacher.patches, large, teacher.patches.positions))
        targets = (
            teacher.head(seen[:, 0]),
            teacher.head(seen[:, 1:].flatten(0, 1)[masking.masked]),
        )
    loss = dinov2_example.distillation(by_crop, by_patch, *targets, model.centres)
    return loss, torch.stack([target.float().mean(0) for target in targets])


def vjepa(model: vjepa_example.VJEPA, clips: Tensor, masking: vjepa_example.Masking) -> Tensor:
    """`VJEPA.forward`."""
    batch = clips.shape[0]
    context, targets = (ids.view(batch, -1) for ids in (masking.context, masking.targets))
    encoder, teacher = model.encoder, model.teacher
    x = take(embed(encoder.patches, clips, encoder.patches.positions), context)
    x = model.to_predictor(run_blocks(encoder.blocks, x)) + model.positions[context]
    hidden = model.mask_token + model.positions[targets]
    x = run_blocks(model.predictor, torch.cat([x, hidden], dim=1))[:, context.shape[1] :]
    with torch.no_grad():
        features = embed(teacher.patches, clips, teacher.patches.positions)
        features = take(run_blocks(teacher.blocks, features), targets).float()
        features = F.layer_norm(features, features.shape[-1:])
    return F.l1_loss(model.predict(x).float(), features)
