"""I-JEPA: context encoder, predictor and target encoder, and the loss between them.

The predictor is applied once a target block (paper section 3, Prediction): sequence b * M + m
holds image b's context and block m's mask tokens, all sequences end to end in one tensor.
"""

from __future__ import annotations

import copy

import torch
from masked_vit_kernels import assemble_predictor_tokens, gather_tokens, latent_prediction_loss
from masked_vit_kernels.pixels import extract_patches, normalize_images
from torch import Tensor, nn

from ijepa.config import ModelConfig
from ijepa.masks.batch import MaskBatch
from ijepa.positions import sincos_positions
from ijepa.vit import (
    INIT_STD,
    LAYER_NORM_EPS,
    Encoder,
    KeptRows,
    LayerNorm,
    Linear,
    RepeatedRows,
    initialize,
    make_blocks,
    residual_dtype,
    run_blocks,
)


class Predictor(nn.Module):
    """A narrow ViT from context features and target positions to target features."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.predictor_width
        self.prune, self.share = config.prune_predictor, config.share_predictor
        self.residual = config.residual
        self.activation_checkpointing = config.activation_checkpointing
        self.predictor_embed = Linear(config.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.predictor_pos_embed = nn.Parameter(
            sincos_positions(width, config.grid), requires_grad=False
        )
        self.predictor_blocks = make_blocks(
            width, config.predictor_depth, config.predictor_heads, config.mlp_ratio
        )
        self.predictor_norm = LayerNorm(width, eps=LAYER_NORM_EPS)
        self.predictor_proj = Linear(width, config.target_width)
        initialize(self, self.predictor_blocks, config.init, config.rescale_init)
        nn.init.trunc_normal_(self.mask_token, std=INIT_STD)

    def forward(self, context: Tensor, masks: MaskBatch) -> Tensor:
        """Context features (Tc, D) -> predictions (Tt, target width) in `masks.targets`' order."""
        context = self.predictor_embed(context)
        context = context.to(residual_dtype(self.residual, self.mask_token))
        repeated = self._distinct_tokens(context, masks) if self.share else None
        x = assemble_predictor_tokens(
            context,
            self.mask_token,
            self.predictor_pos_embed,
            masks.context,
            masks.targets,
            masks.predictor_packing,
        )  # (Tp, P)
        asked = KeptRows(masks.predictor_target_rows, masks.predictor_target_packing)
        x = run_blocks(
            self.predictor_blocks,
            x,
            masks.predictor_packing,
            kept=asked if self.prune else None,
            repeated=repeated,
            activation_checkpointing=self.activation_checkpointing,
        )
        if not self.prune:
            x = gather_tokens(x, asked.rows, asked.packing)
        return self.predictor_proj(self.predictor_norm(x))  # (Tt, target width)

    def _distinct_tokens(self, context: Tensor, masks: MaskBatch) -> RepeatedRows:
        """The predictor's tokens without repetition: each context row once instead of M times,
        and a mask token for each of the N positions instead of each target."""
        positions = self.predictor_pos_embed[0].to(context.dtype)  # (N, P)
        placed = context + gather_tokens(positions, masks.context)  # (Tc, P)
        mask_tokens = self.mask_token.view(1, -1).to(context.dtype) + positions  # (N, P)
        rows = masks.predictor_packing.source_rows
        from_target = rows >= context.shape[0]
        target = torch.where(from_target, rows - context.shape[0], 0)
        index = torch.where(from_target, context.shape[0] + masks.targets[target], rows)
        return RepeatedRows(torch.cat([placed, mask_tokens]), index)


class IJEPA(nn.Module):
    """The three networks. `model(images, masks)` is the training loss.

    The target encoder starts as a copy of the context encoder, receives no gradients and is moved
    by the optimiser's exponential average.

    Attributes:
        float8_targets: the target encoder's products run in float8, by copies of its weights that
            the optimiser keeps; in `targets` alone, not where the encoder itself is called.
    """

    float8_targets: bool = False

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.context_encoder = Encoder(config)
        self.predictor = Predictor(config)
        self.target_encoder = copy.deepcopy(self.context_encoder).requires_grad_(False)

    def forward(
        self, images: Tensor, masks: MaskBatch, denominator: Tensor | None = None
    ) -> Tensor:
        """The scalar loss of one batch.

        Args:
            images: (B, C, Hi, Wi) of the configured size, uint8 or normalised floats.
            masks: of B images on the configured grid.
            denominator: 0-d count the summed distance is divided by, where this batch is one
                part of a step; default: this batch's `count_elements`.

        Raises:
            ValueError: images or masks of another size than the model's.
        """
        self._check(images, masks)
        features, rows = self.targets(images, masks)
        return latent_prediction_loss(
            self.predict(images, masks),
            features,
            rows,
            kind=self.config.loss,
            target_norm=self.config.target_norm,
            denominator=denominator,
        )

    def predict(self, images: Tensor, masks: MaskBatch) -> Tensor:
        """Predictions (Tt, target width) of the target patches, in `masks.targets`' order."""
        context = self.context_encoder(images, masks.context, masks.context_packing)
        return self.predictor(context, masks)

    @torch.no_grad()
    def targets(self, images: Tensor, masks: MaskBatch) -> tuple[Tensor, Tensor]:
        """What is to be predicted, not yet normalised: features (B, N, D) or (R, D), rows (Tt,).

        `rows` index the flattened features, one for each entry of `masks.targets`, -1 on padding.
        """
        of_encoder = self.config.target == "representation"
        if of_encoder and self.config.target_masking == "input":
            features = self.target_encoder(
                images, masks.targets, masks.target_packing, float8=self.float8_targets
            )
            rows = torch.arange(masks.targets.shape[0], device=masks.targets.device)
            return features, rows.masked_fill(masks.targets < 0, -1)
        if of_encoder and self.config.prunes_target:
            union = KeptRows(masks.target_union, masks.target_union_packing)
            features = self.target_encoder(images, kept=union, float8=self.float8_targets)
            return features, masks.target_rows_in_union
        return self.patch_targets(images), masks.target_rows

    @torch.no_grad()
    def patch_targets(self, images: Tensor) -> Tensor:
        """What stands for every patch, not yet normalised, (B, N, target width), no patch hidden:
        features of the target encoder, or pixels."""
        if self.config.target == "pixels":
            return self._pixels(images)
        return self.target_encoder(images, float8=self.float8_targets)

    def prepare(self, batch_size: int) -> None:
        """Build what a forward pass would build at its first use, so that it can be traced."""
        device = self.context_encoder.pos_embed.device
        self.target_encoder.dense_packing(batch_size, self.config.num_patches, device)

    def count_elements(self, masks: MaskBatch) -> Tensor:
        """Elements the loss of these masks averages over, 0-d int64 on their device."""
        return (masks.targets >= 0).sum() * self.config.target_width

    def _pixels(self, images: Tensor) -> Tensor:
        """(B, N, C * ph * pw) patches of normalised pixels."""
        if images.dtype == torch.uint8:
            images = normalize_images(images, self.config.image_mean, self.config.image_std)
        return extract_patches(images, self.config.patch_size)

    def _check(self, images: Tensor, masks: MaskBatch) -> None:
        expected = (masks.batch_size, self.config.channels, *self.config.image_size)
        if tuple(images.shape) != expected:
            raise ValueError(f"images must have shape {expected}, got {tuple(images.shape)}")
        if tuple(masks.grid) != self.config.grid:
            raise ValueError(f"masks of grid {masks.grid}, but the model's is {self.config.grid}")
