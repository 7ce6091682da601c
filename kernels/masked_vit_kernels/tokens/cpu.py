"""The CPU path of the token ops: a few vectorised calls each, tested against `reference.py`.

Plain PyTorch, so that Inductor can trace and fuse it. The public functions have checked shapes and
dtypes; ids are checked here, where reading them back costs little. Under torch.compile that is left
out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from masked_vit_kernels.packing import Packing, PredictorPacking
from masked_vit_kernels.pixels import extract_patches, normalize_images

TARGET_NORM_EPS = 1e-5  # of the targets' normalisations; the released code's LayerNorm has it


def _check_ids(ids: Tensor, count: int, name: str) -> None:
    if torch.compiler.is_compiling() or ids.numel() == 0:
        return
    low, high = (int(x) for x in ids.aminmax())
    if low < -1 or high >= count:
        bad = low if low < -1 else high
        raise IndexError(f"{name} holds {bad}, expected -1 or 0 to {count - 1}")


def _may_be_padded(rows: Tensor) -> bool:
    """Whether a row may be -1; a traced graph has to assume it."""
    return torch.compiler.is_compiling() or bool((rows < 0).any())


def _take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """(R, D), (K,) -> (K, D); zeros where the row is -1, even if row 0 holds NaN."""
    if x.shape[0] == 0:
        return x.new_zeros(rows.shape[0], x.shape[1])
    if not _may_be_padded(rows):
        return x.index_select(0, rows)
    taken = x.index_select(0, rows.clamp(min=0))
    return taken.masked_fill((rows < 0)[:, None], 0)


def _flat_rows(indices: Tensor, packing: Packing, batch: int, num_tokens: int) -> Tensor:
    """Patch ids (capacity,) of packed sequences -> rows b * N + patch of the flattened batch."""
    image = packing.sequence_ids.long() // (packing.num_sequences // batch)
    return torch.where((indices >= 0) & (image >= 0), image * num_tokens + indices, -1)


def gather_tokens(x: Tensor, indices: Tensor, packing: Packing | None = None) -> Tensor:
    """See `masked_vit_kernels.gather_tokens`."""
    if x.ndim == 2:
        _check_ids(indices, x.shape[0], "indices")
        return _take_rows(x, indices)
    batch, num_tokens, width = x.shape
    _check_ids(indices, num_tokens, "indices")
    if indices.ndim == 2:
        first = torch.arange(batch, device=x.device)[:, None] * num_tokens
        rows = torch.where(indices >= 0, indices + first, -1)
        return _take_rows(x.reshape(-1, width), rows.reshape(-1)).view(*indices.shape, width)
    assert packing is not None  # the public function has seen to it
    return _take_rows(x.reshape(-1, width), _flat_rows(indices, packing, batch, num_tokens))


def scatter_tokens(
    x: Tensor, indices: Tensor, fill: Tensor, num_tokens: int, packing: Packing | None = None
) -> Tensor:
    """See `masked_vit_kernels.scatter_tokens`."""
    width = x.shape[-1]
    _check_ids(indices, num_tokens, "indices")
    if x.ndim == 3:
        batch = x.shape[0]
        first = torch.arange(batch, device=x.device)[:, None] * num_tokens
        rows = torch.where(indices >= 0, indices + first, -1).reshape(-1)
    elif packing is not None:
        batch = packing.num_sequences
        rows = _flat_rows(indices, packing, batch, num_tokens)
    else:
        batch, rows = None, indices
    total = num_tokens * (1 if batch is None else batch)
    # The inverse map: which row of x lies at each place, -1 where none does.
    source = torch.full((total + 1,), -1, dtype=torch.long, device=x.device)
    places = torch.where(rows >= 0, rows, total)
    source[places] = torch.arange(rows.numel(), device=x.device)
    source = source[:total]
    if not torch.compiler.is_compiling() and int((source >= 0).sum()) != int((rows >= 0).sum()):
        raise ValueError("indices must be unique within an image: two rows share a place")
    shape = (num_tokens, width) if batch is None else (batch, num_tokens, width)
    taken = _take_rows(x.reshape(-1, width), source).view(shape)
    return torch.where((source >= 0).view(*shape[:-1], 1), taken, fill.to(x.dtype).expand(shape))


def prepend_tokens(x: Tensor, prefix: Tensor, source_rows: Tensor, prefix_rows: Tensor) -> Tensor:
    """See `masked_vit_kernels.prepend_tokens`; prefix (S * P, D)."""
    return _take_rows(x, source_rows).index_copy(0, prefix_rows, prefix.to(x.dtype))


def split_prefix(x: Tensor, prefix_rows: Tensor, token_rows: Tensor) -> tuple[Tensor, Tensor]:
    """See `masked_vit_kernels.split_prefix`; prefix (S * P, D)."""
    return x.index_select(0, prefix_rows), _take_rows(x, token_rows)


def embed_visible_patches(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    indices: Tensor | None = None,
    packing: Packing | None = None,
    *,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """See `masked_vit_kernels.embed_visible_patches`."""
    width, channels, *patch = weight.shape
    dtype = weight.dtype
    if torch.is_autocast_enabled(images.device.type):
        dtype = torch.get_autocast_dtype(images.device.type)
    patches = extract_patches(images, patch)  # still in the images' dtype
    if indices is not None:
        patches = gather_tokens(patches, indices, packing)
    patches = _normalize_patches(patches, channels, mean, std).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    tokens = F.linear(patches, weight.flatten(1).to(dtype), bias)
    if pos_embed is not None:
        position = pos_embed.reshape(-1, width).to(dtype)
        tokens = tokens + (position if indices is None else _take_rows_like(position, indices))
    if indices is None:
        return tokens
    return tokens.masked_fill((indices < 0)[..., None], 0)


def _take_rows_like(position: Tensor, indices: Tensor) -> Tensor:
    """(N, D) by (...,) ids -> (..., D)."""
    return _take_rows(position, indices.reshape(-1)).view(*indices.shape, position.shape[1])


def _normalize_patches(
    patches: Tensor,
    channels: int,
    mean: Sequence[float] | Tensor | None,
    std: Sequence[float] | Tensor | None,
) -> Tensor:
    """Normalise (..., C * ph * pw) patches: the same arithmetic as on images, on fewer pixels."""
    shape = patches.shape
    as_images = patches.reshape(-1, channels, 1, shape[-1] // channels)
    return normalize_images(as_images, mean, std).view(shape)


def assemble_predictor_tokens(
    context: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    context_ids: Tensor,
    target_ids: Tensor,
    predictor_packing: PredictorPacking,
) -> Tensor:
    """See `masked_vit_kernels.assemble_predictor_tokens`."""
    width = context.shape[1]
    position = pos_embed.reshape(-1, width).to(context.dtype)
    _check_ids(context_ids, position.shape[0], "context_ids")
    _check_ids(target_ids, position.shape[0], "target_ids")
    placed_context = context + _take_rows(position, context_ids)
    placed_targets = mask_token.reshape(1, width).to(context.dtype) + _take_rows(
        position, target_ids
    )
    return _take_rows(torch.cat([placed_context, placed_targets]), predictor_packing.source_rows)


def latent_prediction_loss(
    predictions: Tensor,
    target_features: Tensor,
    target_rows: Tensor,
    *,
    kind: str = "smooth_l1",
    target_norm: str = "layer",
    denominator: Tensor | None = None,
) -> Tensor:
    """See `masked_vit_kernels.latent_prediction_loss`."""
    width = target_features.shape[-1]
    precision = torch.float64 if predictions.dtype == torch.float64 else torch.float32
    features = target_features.detach()
    if target_norm == "instance":
        features = _standardise_over_patches(features.to(precision))
    features = features.reshape(-1, width)
    _check_ids(target_rows, features.shape[0], "target_rows")
    valid = (target_rows >= 0)[:, None]
    targets = _take_rows(features, target_rows).to(precision)
    if target_norm == "layer":
        targets = F.layer_norm(targets, (width,), eps=TARGET_NORM_EPS)
    predictions = predictions.to(precision).masked_fill(~valid, 0)
    targets = targets.masked_fill(~valid, 0)
    values = width  # of a row
    if kind == "cosine":
        similarity = F.cosine_similarity(predictions, targets, dim=1)
        total, values = (valid[:, 0] * (1 - similarity)).sum(), 1
    else:
        total = _DISTANCES[kind](predictions, targets, reduction="sum")
    if denominator is None:
        denominator = (valid.sum() * values).clamp(min=1)
    return total / denominator


_DISTANCES = {"smooth_l1": F.smooth_l1_loss, "l2": F.mse_loss, "l1": F.l1_loss}


def _standardise_over_patches(features: Tensor) -> Tensor:
    """(B, N, D): each feature of an image to mean 0 and variance 1 over the patches."""
    variance, mean = torch.var_mean(features, dim=1, correction=0, keepdim=True)
    return (features - mean) * (variance + TARGET_NORM_EPS).rsqrt()
