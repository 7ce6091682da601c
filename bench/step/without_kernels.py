"""Our packed step with every kernel replaced by PyTorch's own parts.

Attention pads the sequences into one dense batch with a key mask for SDPA; the token ops are the
plain ones; AdamW is PyTorch's fused one and the average a foreach lerp.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from masked_vit_kernels import Packing
from masked_vit_kernels.tokens import cpu
from torch import Tensor

from bench.step.best_stock import StockUpdate
from bench.step.ours import our_phases
from bench.step.released_style import Clock, no_clock
from ijepa import IJEPA, MaskBatch, model, vit


def _padded(x: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """x (T, ...) -> (S, L, ...) and which places hold a token (S, L)."""
    starts, lengths = packing.cu_seqlens[:-1].long(), packing.cu_seqlens.diff()
    column = torch.arange(packing.max_seqlen, device=x.device)
    there = column < lengths[:, None]
    rows = torch.where(there, starts[:, None] + column, 0)
    return x[rows], there


def _unpadded(x: Tensor, packing: Packing) -> Tensor:
    """x (S, L, ...) -> (T, ...), zeros on padding rows."""
    sequence = packing.sequence_ids.long()
    present = sequence >= 0
    sequence = sequence.clamp(min=0)
    row = torch.arange(packing.capacity, device=x.device) - packing.cu_seqlens[sequence]
    row = row.clamp(0, packing.max_seqlen - 1)
    return x[sequence, row] * present[:, None, None]


def _attention(q: Tensor, k: Tensor, v: Tensor, packing_q: Packing, packing_k: Packing) -> Tensor:
    queries, _ = _padded(q, packing_q)
    keys, there = _padded(k, packing_k)
    values, _ = _padded(v, packing_k)
    queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
    mask = there[:, None, None]
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    return _unpadded(out.transpose(1, 2), packing_q)


def _qkvpacked(qkv: Tensor, _cu_seqlens, _max_seqlen, *, packing: Packing) -> Tensor:
    q, k, v = qkv.unbind(1)
    return _attention(q, k, v, packing, packing)


def _kvpacked(q: Tensor, kv: Tensor, *_lengths, packing_q: Packing, packing_k: Packing) -> Tensor:
    k, v = kv.unbind(1)
    return _attention(q, k, v, packing_q, packing_k)


@contextlib.contextmanager
def plain_ops() -> Iterator[None]:
    """The model's ops replaced, and the host-side checks of the plain ones left out."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(cpu, "_check_ids", lambda *_: None))
        stack.enter_context(mock.patch.object(vit, "varlen_attention_qkvpacked", _qkvpacked))
        stack.enter_context(mock.patch.object(vit, "varlen_attention_kvpacked", _kvpacked))
        stack.enter_context(
            mock.patch.object(vit, "embed_visible_patches", cpu.embed_visible_patches)
        )
        for module in (vit, model):
            stack.enter_context(mock.patch.object(module, "gather_tokens", cpu.gather_tokens))
        for name in ("assemble_predictor_tokens", "latent_prediction_loss"):
            stack.enter_context(mock.patch.object(model, name, getattr(cpu, name)))
        yield


class WithoutKernels:
    """One optimiser step a call."""

    def __init__(self, network: IJEPA, precision: str):
        self.model, self.autocast = network, precision == "bf16"
        self.update = StockUpdate(network)

    def __call__(self, images: Tensor, masks: MaskBatch, clock: Clock = no_clock) -> Tensor:
        with plain_ops():
            loss = our_phases(self.model, images, masks, self.autocast, clock)
            loss.backward()
            clock("backward")
        self.update(clock)
        return loss.detach()
