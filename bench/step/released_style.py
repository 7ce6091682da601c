"""A training step as the released code takes it, written from its description.

Dense (B, K, D) tensors: every image keeps as many context patches, and every block as many target
patches, as the poorest of the batch. All patches are embedded and then selected; attention is a
materialised softmax; the target encoder is averaged parameter by parameter; the loss and the norm
of every attention weight's gradient are read by the host at every step.

The weights are those of an `IJEPA`, used through its modules, so that all providers start alike.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa import IJEPA, MaskBatch
from ijepa.train.optim import ema_pairs, parameter_groups
from ijepa.vit import Attention, Block, Encoder

LR, WEIGHT_DECAY, MOMENTUM = 1e-4, 0.05, 0.996
Clock = Callable[[str], None]
Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
RunBlock = Callable[..., Tensor]  # (block, (B, N, D)) -> (B, N, D)


def no_clock(_phase: str) -> None:
    """Where phases are not timed."""


def dense_ids(masks: MaskBatch) -> tuple[Tensor, Tensor]:
    """Context (B, K) and targets (B, M, K') of masks whose lengths are all alike.

    Raises:
        ValueError: lengths differ; draw the masks with `batching="truncate"`.
    """
    images, blocks = masks.batch_size, masks.num_targets
    for packing, sequences in (
        (masks.context_packing, images),
        (masks.target_packing, images * blocks),
    ):
        lengths = packing.cu_seqlens.diff()
        if len(set(lengths.tolist())) != 1 or len(lengths) != sequences:
            raise ValueError("dense providers need masks of one length, batching='truncate'")
    return masks.context.view(images, -1), masks.targets.view(images, blocks, -1)


def take(x: Tensor, ids: Tensor) -> Tensor:
    """x (B, N, D) at ids (B, K) -> (B, K, D)."""
    return torch.gather(x, 1, ids[..., None].expand(-1, -1, x.shape[2]))


def softmax_mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of (B, H, N, Dh) with the scores in memory."""
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return scores.softmax(dim=-1) @ v


def attend(attention: Attention, x: Tensor, mix: Mix) -> Tensor:
    """(B, N, D) -> (B, N, D)."""
    batch, tokens, width = x.shape
    qkv = attention.qkv(x).reshape(batch, tokens, 3, attention.heads, -1).permute(2, 0, 3, 1, 4)
    mixed = mix(*qkv.unbind(0))  # (B, H, N, Dh)
    return attention.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


def run_block(block: Block, x: Tensor, mix: Mix = softmax_mix) -> Tensor:
    """(B, N, D) -> (B, N, D)."""
    x = x + attend(block.attn, block.norm1(x), mix)
    return x + block.mlp(block.norm2(x))


def encode(
    encoder: Encoder, images: Tensor, ids: Tensor | None, run: RunBlock = run_block
) -> Tensor:
    """Float images -> (B, K, D), or (B, N, D) without ids."""
    x = encoder.patch_embed.proj(images).flatten(2).transpose(1, 2)
    x = x + encoder.pos_embed
    if ids is not None:
        x = take(x, ids)
    for block in encoder.blocks:
        x = run(block, x)
    return encoder.norm(x)


def target_features(
    model: IJEPA, images: Tensor, targets: Tensor, run: RunBlock = run_block
) -> Tensor:
    """(M * B, K', D), all images of block 0 first."""
    with torch.no_grad():
        features = encode(model.target_encoder, images, None, run)
        features = F.layer_norm(features, (features.shape[-1],))
        return torch.cat([take(features, targets[:, m]) for m in range(targets.shape[1])])


def predict(
    model: IJEPA, context: Tensor, ids: Tensor, targets: Tensor, run: RunBlock = run_block
) -> Tensor:
    """Context features (B, K, D) -> predictions (M * B, K', D)."""
    predictor, blocks = model.predictor, targets.shape[1]
    positions = predictor.predictor_pos_embed.expand(ids.shape[0], -1, -1)
    x = predictor.predictor_embed(context) + take(positions, ids)
    tokens = torch.cat([take(positions, targets[:, m]) for m in range(blocks)])
    tokens = tokens + predictor.mask_token
    x = torch.cat([x.repeat(blocks, 1, 1), tokens], dim=1)
    for block in predictor.predictor_blocks:
        x = run(block, x)
    return predictor.predictor_proj(predictor.predictor_norm(x)[:, ids.shape[1] :])


def normalised(images: Tensor, model: IJEPA) -> Tensor:
    """uint8 (B, C, Hi, Wi) -> float32, on the images' device."""
    mean, std = (
        getattr(model.context_encoder, name).view(1, -1, 1, 1)
        for name in ("image_mean", "image_std")
    )
    return (images.float() / 255 - mean) / std


class ReleasedStyle:
    """One optimiser step a call."""

    def __init__(self, model: IJEPA, precision: str):
        self.model, self.autocast = model, precision == "bf16"
        device = next(model.parameters()).device.type
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model), lr=LR, weight_decay=WEIGHT_DECAY
        )
        self.scaler = torch.amp.GradScaler(device, enabled=self.autocast and device == "cuda")
        self.pairs = ema_pairs(model)

    def __call__(self, images: Tensor, masks: MaskBatch, clock: Clock = no_clock) -> float:
        model = self.model
        context_ids, targets = dense_ids(masks)
        images = normalised(images, model)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.autocast):
            expected = target_features(model, images, targets)
            clock("target")
            context = encode(model.context_encoder, images, context_ids)
            clock("context")
            predictions = predict(model, context, context_ids, targets)
            loss = F.smooth_l1_loss(predictions, expected)
            clock("predictor")
        self.scaler.scale(loss).backward()
        clock("backward")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._read_gradient_norms()
        self.optimizer.zero_grad(set_to_none=True)
        clock("optimizer")
        with torch.no_grad():
            for target, source in self.pairs:
                target.data.mul_(MOMENTUM).add_((1.0 - MOMENTUM) * source.detach().data)
        clock("average")
        return loss.item()

    def _read_gradient_norms(self) -> list[float]:
        return [
            float(torch.norm(parameter.grad))
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None and "qkv" in name
        ]
