"""Every op in plain PyTorch: what the library computes, and the oracle the kernels are held to.

Written to be read, one sequence at a time, with autograd deriving every gradient. Pass float64
tensors and everything is computed in float64; half-precision inputs are computed in float32 and
rounded once at the end, as the kernels do. Speed is the matter of the `cpu.py` files.

Shapes use the glossary of `packing.py`. Rows whose id is -1 are padding: they come out as zeros,
receive no gradient and count in no mean, whatever they hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from masked_vit_kernels.packing import Packing, PredictorPacking, PrefixPacking

# F.layer_norm's default, used by the released code on the targets; of instance norm here too.
TARGET_LAYER_NORM_EPS = 1e-5


def _wide(x: Tensor) -> Tensor:
    """`x` in the precision the reference computes in: float64 stays, all else is float32."""
    return x if x.dtype == torch.float64 else x.float()


def _check_ids(ids: Tensor, count: int, name: str) -> None:
    """Raise IndexError where an id is neither -1 nor in [0, count)."""
    bad = ids[(ids < -1) | (ids >= count)]
    if bad.numel():
        raise IndexError(f"{name} holds {int(bad[0])}, expected -1 or 0 to {count - 1}")


def gather_tokens(x: Tensor, indices: Tensor, packing: Packing | None = None) -> Tensor:
    """Take rows of `x`: dense (B, N, D) by (B, K), packed (capacity,), or flat (T, D) by (K,)."""
    if x.ndim == 2:
        _check_ids(indices, x.shape[0], "indices")
        rows = [x[i] if i >= 0 else x.new_zeros(x.shape[1]) for i in indices.tolist()]
        return torch.stack(rows) if rows else x.new_zeros(0, x.shape[1])
    _check_ids(indices, x.shape[1], "indices")
    if indices.ndim == 2:
        return torch.stack([gather_tokens(x[b], indices[b]) for b in range(x.shape[0])])
    assert packing is not None
    per_image = packing.num_sequences // x.shape[0]
    sequences = packing.sequence_ids.tolist()
    rows = [
        x[s // per_image, i] if s >= 0 and i >= 0 else x.new_zeros(x.shape[2])
        for s, i in zip(sequences, indices.tolist(), strict=True)
    ]
    return torch.stack(rows) if rows else x.new_zeros(0, x.shape[2])


def scatter_tokens(
    x: Tensor, indices: Tensor, fill: Tensor, num_tokens: int, packing: Packing | None = None
) -> Tensor:
    """Put rows of `x` at `indices` among `num_tokens` rows of `fill`; the inverse of a gather."""
    width = x.shape[-1]
    _check_ids(indices, num_tokens, "indices")
    if x.ndim == 2 and packing is None:
        rows = list(fill.expand(num_tokens, width).to(x.dtype))
        for row, i in enumerate(indices.tolist()):
            if i >= 0:
                rows[i] = x[row]
        return torch.stack(rows)
    if packing is None:
        images = x.shape[0]
        spread = fill.expand(images, num_tokens, width)
        return torch.stack(
            [scatter_tokens(x[b], indices[b], spread[b], num_tokens) for b in range(images)]
        )
    spread = fill.expand(packing.num_sequences, num_tokens, width)
    bounds = packing.cu_seqlens.tolist()
    return torch.stack(
        [
            scatter_tokens(x[start:end], indices[start:end], spread[b], num_tokens)
            for b, (start, end) in enumerate(pairwise(bounds))
        ]
    )


def prepend_tokens(x: Tensor, prefix: Tensor, packing: PrefixPacking) -> Tensor:
    """P tokens of `prefix` (P, D), (1, P, D) or (S, P, D) before each sequence of x (T, D)."""
    count, parts, first = packing.num_prefix_tokens, [], 0
    spread = prefix.to(x.dtype).expand(packing.num_sequences, count, x.shape[1])
    for s, (start, end) in enumerate(pairwise(packing.cu_seqlens.tolist())):
        length = end - start - count
        parts += [spread[s], x[first : first + length]]
        first += length
    padding = packing.capacity - int(packing.cu_seqlens[-1])
    return torch.cat([*parts, x.new_zeros(padding, x.shape[1])])


def split_prefix(x: Tensor, packing: PrefixPacking) -> tuple[Tensor, Tensor]:
    """The inverse: prefix (S, P, D) and tokens (T, D)."""
    count, bounds = packing.num_prefix_tokens, list(pairwise(packing.cu_seqlens.tolist()))
    tokens = [x[start + count : end] for start, end in bounds]
    capacity = packing.token_rows.shape[0]
    padding = capacity - sum(len(part) for part in tokens)
    prefix = torch.stack([x[start : start + count] for start, _ in bounds])
    return prefix, torch.cat([*tokens, x.new_zeros(padding, x.shape[1])])


def normalize_images(
    images: Tensor, mean: Sequence[float] | Tensor | None, std: Sequence[float] | Tensor | None
) -> Tensor:
    """uint8 pixels become x / 255; then (x - mean) / std per channel where those are given."""
    x = images.float() / 255.0 if images.dtype == torch.uint8 else _wide(images)
    if mean is not None:
        x = x - torch.as_tensor(mean, dtype=x.dtype, device=x.device).view(-1, *[1] * (x.ndim - 2))
    if std is not None:
        x = x / torch.as_tensor(std, dtype=x.dtype, device=x.device).view(-1, *[1] * (x.ndim - 2))
    return x


def extract_patches(images: Tensor, patch_size: Sequence[int]) -> Tensor:
    """(B, C, Hi, Wi) -> (B, N, C * ph * pw) patches in raster order, each in (C, ph, pw) order.

    Clips (B, C, F, Hi, Wi) -> (B, N, C * pt * ph * pw) tubelets, frame by frame of patches.
    """
    if images.ndim == 5:
        pt, ph, pw = patch_size
        tubelets = [
            clip[:, t : t + pt, y : y + ph, x : x + pw].reshape(-1)
            for clip in images
            for t in range(0, images.shape[2], pt)
            for y in range(0, images.shape[3], ph)
            for x in range(0, images.shape[4], pw)
        ]
        return torch.stack(tubelets).unflatten(0, (images.shape[0], -1))
    batch, channels, height, width = images.shape
    ph, pw = patch_size
    tiles = images.reshape(batch, channels, height // ph, ph, width // pw, pw)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * ph * pw)


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
    """Linear patch embedding plus position, then only the patches that `indices` names.

    weight (D, C, ph, pw), pos_embed (N, D) or (1, N, D). Without indices every patch: (B, N, D).
    """
    dtype = weight.dtype
    pixels = normalize_images(images, mean, std)
    if dtype == torch.float64:
        pixels = pixels.double()
    patches = extract_patches(pixels, weight.shape[2:])
    tokens = F.linear(patches, _wide(weight).flatten(1), None if bias is None else _wide(bias))
    if pos_embed is not None:
        tokens = tokens + _wide(pos_embed).reshape(1, -1, weight.shape[0])
    tokens = tokens.to(dtype)
    return tokens if indices is None else gather_tokens(tokens, indices, packing)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scale) v, sequence by sequence.

    q (Tq, H, Dh), k and v (Tk, Hk, Dh), each head of which serves H / Hk heads of q in a row ->
    out (Tq, H, Dh) in q's dtype and the natural-log LSE (H, Tq), -inf where there are no keys (the
    output is zero there) and on padding.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outputs, lses = [], []
    for s in range(len(bounds_q) - 1):
        rows_q, rows_k = slice(*bounds_q[s : s + 2]), slice(*bounds_k[s : s + 2])
        queries = _wide(q[rows_q]).transpose(0, 1)  # (H, nq, Dh)
        keys = _wide(k[rows_k]).transpose(0, 1)  # (H, nk, Dh)
        values = _wide(v[rows_k]).transpose(0, 1)  # (H, nk, Dh)
        scores = queries @ keys.transpose(1, 2) * scale  # (H, nq, nk)
        outputs.append((scores.softmax(-1) @ values).transpose(0, 1))  # (nq, H, Dh)
        lses.append(scores.logsumexp(-1))  # (H, nq), -inf over an empty set
    padding = q.shape[0] - bounds_q[-1]
    outputs.append(_wide(q).new_zeros(padding, *q.shape[1:]))
    lses.append(_wide(q).new_full((q.shape[1], padding), -torch.inf))
    return torch.cat(outputs).to(q.dtype), torch.cat(lses, dim=1)


def assemble_predictor_tokens(
    context: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    context_ids: Tensor,
    target_ids: Tensor,
    predictor_packing: PredictorPacking,
) -> Tensor:
    """The predictor's input (paper section 3): context plus position, mask token plus position.

    context (Tc, P), mask_token P elements, pos_embed (N, P) or (1, N, P) -> (capacity, P).
    """
    width = context.shape[1]
    position = _wide(pos_embed).reshape(-1, width)
    mask = _wide(mask_token).reshape(width)
    _check_ids(context_ids, position.shape[0], "context_ids")
    _check_ids(target_ids, position.shape[0], "target_ids")
    rows = []
    for source in predictor_packing.source_rows.tolist():
        if source < 0:
            rows.append(_wide(context).new_zeros(width))
        elif source < context.shape[0]:
            rows.append(_wide(context[source]) + position[context_ids[source]])
        else:
            rows.append(mask + position[target_ids[source - context.shape[0]]])
    return torch.stack(rows).to(context.dtype)


def latent_prediction_loss(
    predictions: Tensor,
    target_features: Tensor,
    target_rows: Tensor,
    *,
    kind: str = "smooth_l1",
    target_norm: str = "layer",
    denominator: Tensor | None = None,
) -> Tensor:
    """Distance between predictions (Tt, D) and the normalised target rows they stand for.

    target_features (B, N, D) or (R, D) without gradient, target_rows (Tt,) rows of it or -1.
    target_norm "layer" over each row, "instance" over the N patches of an image, or "none".
    """
    width = target_features.shape[-1]
    features = _wide(target_features).detach()
    if target_norm == "instance":
        centred = features - features.mean(dim=1, keepdim=True)
        variance = centred.square().mean(dim=1, keepdim=True)  # (B, 1, D), biased
        features = centred / (variance + TARGET_LAYER_NORM_EPS).sqrt()
    features = features.reshape(-1, width)
    _check_ids(target_rows, features.shape[0], "target_rows")
    valid = target_rows >= 0
    targets = features[target_rows[valid]]
    if target_norm == "layer":
        targets = F.layer_norm(targets, (width,), eps=TARGET_LAYER_NORM_EPS)
    difference = _wide(predictions)[valid] - targets
    if kind == "smooth_l1":
        size = difference.abs()
        distances = torch.where(size < 1, size.square() / 2, size - 0.5)
    elif kind == "l2":
        distances = difference.square()
    elif kind == "l1":
        distances = difference.abs()
    else:  # one a row
        lengths = [x.norm(dim=1).clamp(min=1e-8) for x in (_wide(predictions)[valid], targets)]
        dots = (_wide(predictions)[valid] * targets).sum(1)
        distances = 1 - dots / (lengths[0] * lengths[1])
    total = distances.sum()
    return total / (max(distances.numel(), 1) if denominator is None else denominator)


@torch.no_grad()
def ema_update_(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float) -> None:
    """target = momentum * target + (1 - momentum) * source, in place."""
    for target, source in zip(targets, sources, strict=True):
        updated = momentum * target.double() + (1.0 - momentum) * source.double()
        target.copy_(updated)


@torch.no_grad()
def adamw_ema_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    moments: Sequence[tuple[Tensor, Tensor]],
    targets: Sequence[Tensor | None],
    steps: list[int],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.996,
    max_grad_norm: float | None = None,
    loss: float = 0.0,
) -> tuple[float, bool]:
    """One AdamW step and the moving average of the updated parameters, all in place.

    `steps` are the parameters' step counts. A parameter without gradient is not updated, its
    target still moves. Returns (gradient norm before clipping, whether the step was skipped).
    """
    present = [gradient.double() for gradient in gradients if gradient is not None]
    norm = float(sum(gradient.square().sum() for gradient in present)) ** 0.5
    if not (math.isfinite(norm) and math.isfinite(loss)):
        return norm, True
    clip = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + 1e-6))
    for i, (p, gradient, target) in enumerate(zip(parameters, gradients, targets, strict=True)):
        if gradient is not None:
            steps[i] += 1
            g = clip * gradient.to(p.dtype)
            m, v = moments[i]
            m.copy_(betas[0] * m + (1 - betas[0]) * g)
            v.copy_(betas[1] * v + (1 - betas[1]) * g * g)
            denominator = (v / (1 - betas[1] ** steps[i])).sqrt() + eps
            update = m / (1 - betas[0] ** steps[i]) / denominator
            p.copy_((1 - lr * weight_decay) * p - lr * update)
        if target is not None:
            ema_update_([target], [p], momentum)
    return norm, False
