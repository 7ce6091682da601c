"""Variable-length attention, forward and backward, against its peers at I-JEPA's shapes.

    pytest bench/bench_attention.py -s

Targets are dense (equal lengths), contexts and predictor sequences are packed as the sampler draws
them. Every peer that computes the same thing is checked against ours once and then timed; padded
SDPA without a mask computes something else and stands in a table of its own. Peers that are not
installed, or that refuse a shape, are left out and named. On a CPU one small shape runs against
SDPA, so that anyone can try it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from masked_vit_kernels import Packing, pack_lengths, varlen_attention_qkvpacked
from shapes import DTYPES, EVERY_SHAPE, Shape
from timing import backward_of, compare
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS = {"H": 16, "L": 16, "B": 12}

# Bytes an element of one of q, k, v, out, dout, dq, dk, dv in half precision: what must move once.
FORWARD_ROWS, BACKWARD_ROWS = 4, 8

Attend = Callable[[Tensor], Tensor]  # qkv (T, 3, H, D) -> (T, H, D)


def _ours(packing: Packing) -> Attend:
    return lambda qkv: varlen_attention_qkvpacked(
        qkv, packing.cu_seqlens, packing.max_seqlen, packing=packing
    )


def _torch_varlen(packing: Packing) -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = packing.cu_seqlens, packing.max_seqlen
    return lambda qkv: varlen_attn(*qkv.unbind(1), bounds, bounds, longest, longest)


def _flash_attn(packing: Packing) -> Attend:
    from flash_attn import flash_attn_varlen_qkvpacked_func

    return lambda qkv: flash_attn_varlen_qkvpacked_func(qkv, packing.cu_seqlens, packing.max_seqlen)


def _xformers(packing: Packing) -> Attend:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    bias = BlockDiagonalMask.from_seqlens(packing.cu_seqlens.diff().tolist())
    return lambda qkv: memory_efficient_attention(*qkv[None].unbind(2), attn_bias=bias)[0]


def _flex(packing: Packing) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    sequence, total = packing.sequence_ids, packing.capacity
    mask = create_block_mask(
        lambda b, h, i, j: sequence[i] == sequence[j], None, None, total, total, sequence.device
    )
    compiled = torch.compile(flex_attention)

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = (part.transpose(0, 1)[None] for part in qkv.unbind(1))
        return compiled(q, k, v, block_mask=mask)[0].transpose(0, 1)

    return attend


def _jagged(packing: Packing) -> Attend:
    offsets = packing.cu_seqlens.long()

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(part, offsets, max_seqlen=packing.max_seqlen)
            for part in qkv.unbind(1)
        )
        parts = (part.transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(*parts).transpose(1, 2).values()

    return attend


def _sdpa_masked(packing: Packing) -> Attend:
    """Padded to the longest, with a mask; padding and unpadding are part of the price."""
    lengths = packing.cu_seqlens.diff()
    columns = torch.arange(packing.max_seqlen, device=lengths.device)
    valid = columns < lengths[:, None]  # (S, N)
    rows = (packing.cu_seqlens[:-1, None] + columns).clamp(max=packing.capacity - 1)
    mask = valid[:, None, None, :]
    places = valid.flatten().nonzero()[:, 0]

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = qkv[rows].permute(2, 0, 3, 1, 4)  # (S, H, N, D) each
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(0, 1)[places]

    return attend


def _sdpa_by_sequence(packing: Packing) -> Attend:
    bounds = list(pairwise(packing.cu_seqlens.tolist()))

    def attend(qkv: Tensor) -> Tensor:
        parts = (qkv[a:b].permute(1, 2, 0, 3)[:, None] for a, b in bounds)
        outputs = [F.scaled_dot_product_attention(*part)[0].transpose(0, 1) for part in parts]
        return torch.cat(outputs)

    return attend


def _sdpa_equal(backend: SDPBackend | None) -> Callable[[Packing], Attend]:
    """Dense (S, N, 3, H, D) attention by one backend of SDPA; `max_seqlen` is every length."""

    def build(packing: Packing) -> Attend:
        def attend(qkv: Tensor) -> Tensor:
            dense = qkv.view(packing.num_sequences, packing.max_seqlen, *qkv.shape[1:])
            with sdpa_kernel(backend) if backend else torch.enable_grad():
                out = F.scaled_dot_product_attention(*dense.permute(2, 0, 3, 1, 4))
            return out.transpose(1, 2).flatten(0, 1)

        return attend

    return build


PACKED_PEERS = {
    "torch varlen_attn": _torch_varlen,
    "FlexAttention, compiled": _flex,
    "jagged nested tensor": _jagged,
    "SDPA padded with a mask": _sdpa_masked,
}
DENSE_PEERS = {
    "SDPA flash": _sdpa_equal(SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": _sdpa_equal(SDPBackend.CUDNN_ATTENTION),
    "torch varlen_attn": _torch_varlen,
    "FlexAttention, compiled": _flex,
}
for _name, _build in (("flash_attn", _flash_attn), ("xformers", _xformers)):
    if importlib.util.find_spec(_name):
        PACKED_PEERS[_name] = DENSE_PEERS[_name] = _build
CPU_PACKED_PEERS = {
    "SDPA padded with a mask": _sdpa_masked,
    "SDPA, one call a sequence": _sdpa_by_sequence,
}
CPU_DENSE_PEERS = {"SDPA": _sdpa_equal(None)}


def _accepts(build: Callable[[Packing], Attend], packing: Packing, qkv: Tensor, name: str) -> bool:
    """Whether a peer is there and runs this shape, forward and backward."""
    try:
        out = build(packing)(qkv)
        torch.autograd.grad(out, qkv, torch.ones_like(out))
    except (ImportError, RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
        print(f"  left out: {name}: {str(error).splitlines()[0][:90]}")
        return False
    return True


def _bench(title: str, packing: Packing, heads: int, head_dim: int, device: str, peers: dict):
    packing, dtype = packing.to(device), DTYPES[device]
    total = packing.capacity

    def make_inputs() -> dict:
        qkv = torch.randn(total, 3, heads, head_dim, device=device, dtype=dtype)
        return {"qkv": qkv.requires_grad_()}

    sample = make_inputs()["qkv"]
    built = {"ours": _ours(packing)}
    built |= {
        name: build(packing)
        for name, build in peers.items()
        if _accepts(build, packing, sample, name)
    }
    row_bytes = total * heads * head_dim * dtype.itemsize
    forwards = {n: (lambda s, f=f: lambda: f(s["qkv"].detach())) for n, f in built.items()}
    backwards = {n: (lambda s, f=f: backward_of(f, [s["qkv"]])) for n, f in built.items()}
    for direction, providers, rows in (
        ("forward", forwards, FORWARD_ROWS),
        ("backward", backwards, BACKWARD_ROWS),
    ):
        compare(f"attention {direction} {title}", providers, make_inputs, rows * row_bytes, device)


def _heads(shape: Shape) -> int:
    return HEADS[shape.name[0]]


@pytest.mark.parametrize(("device", "shape"), EVERY_SHAPE, ids=str)
def test_target(device, shape):
    packing = pack_lengths([shape.num_patches] * shape.batch)
    peers = DENSE_PEERS if device == "cuda" else CPU_DENSE_PEERS
    heads = _heads(shape)
    _bench(f"{shape.name} target", packing, heads, shape.width // heads, device, peers)


@pytest.mark.parametrize("part", ["context", "predictor"])
@pytest.mark.parametrize(("device", "shape"), EVERY_SHAPE, ids=str)
def test_packed(device, shape, part):
    masks, heads = shape.masks(), _heads(shape)
    drawn = masks.context_packing if part == "context" else masks.predictor_packing
    packing = pack_lengths(drawn.cu_seqlens.diff().tolist())
    width = shape.width if part == "context" else shape.predictor_width
    peers = PACKED_PEERS if device == "cuda" else CPU_PACKED_PEERS
    _bench(f"{shape.name} {part}", packing, heads, width // heads, device, peers)


@pytest.mark.parametrize(("device", "shape"), EVERY_SHAPE, ids=str)
def test_padded_without_a_mask(device, shape):
    """What SDPA costs when padding is attended to: not the same result, for orientation only."""
    lengths = shape.masks().context_packing.cu_seqlens.diff()
    packing = pack_lengths([int(lengths.max())] * shape.batch)
    heads = _heads(shape)
    title = f"{shape.name} context padded to its longest, no mask"
    peers = DENSE_PEERS if device == "cuda" else CPU_DENSE_PEERS
    _bench(title, packing, heads, shape.width // heads, device, peers)
