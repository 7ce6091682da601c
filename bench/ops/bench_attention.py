"""Variable-length attention, forward and backward, against its peers at I-JEPA's shapes.

    pytest bench/ops/bench_attention.py -s

Targets are dense (equal lengths), contexts and predictor sequences are packed as the sampler draws
them. Every peer that computes the same thing is checked against ours once and then timed. Peers
take q, k and v apart, so that their gradients come in three buffers: of one qkv buffer, which the
model's projection writes, they would pay a stack besides (`, of qkv` for the one that is nearest to
ours). Ours is timed in both forms. Padded
SDPA without a mask computes something else and stands in a table of its own. FlexAttention, which
is compiled for every shape, has tables of its own (`-k flex`). Peers that are not installed or that
refuse a shape are left out and named. On a CPU one small shape runs against SDPA, so that anyone
can try it.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from masked_vit_kernels import (
    Packing,
    pack_lengths,
    varlen_attention,
    varlen_attention_qkvpacked,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.sizes import DTYPES, EVERY_SHAPE, Shape
from bench.timing import backward_of, compare

HEADS = {"G": 16, "H": 16, "L": 16, "B": 12}
G16 = Shape("G/16 batch 128", 128, (14, 14), 16, 1408)  # head dim 88
L14 = Shape("L/14 batch 128", 128, (16, 16), 14, 1024)  # head dim 64 at 256 tokens
FLEX_BLOCK = 128

# Bytes an element of one of q, k, v, out, dout, dq, dk, dv in half precision: what must move once.
FORWARD_ROWS, BACKWARD_ROWS = 4, 8

# Tensors, and for ours type checkers do not see that no LSE is asked for.
Attend = Callable[..., Any]  # (q, k, v) (T, H, D) each, or (qkv,) (T, 3, H, D) -> (T, H, D)


def _ours(packing: Packing) -> Attend:
    return lambda qkv: varlen_attention_qkvpacked(
        qkv, packing.cu_seqlens, packing.max_seqlen, packing=packing
    )


def _ours_apart(packing: Packing) -> Attend:
    bounds, longest = packing.cu_seqlens, packing.max_seqlen
    return lambda q, k, v: varlen_attention(
        q, k, v, bounds, bounds, longest, longest, packing_q=packing, packing_k=packing
    )


def _torch_varlen(packing: Packing) -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = packing.cu_seqlens, packing.max_seqlen
    return lambda q, k, v: varlen_attn(q, k, v, bounds, bounds, longest, longest)


def _torch_varlen_of_qkv(packing: Packing) -> Attend:
    attend = _torch_varlen(packing)
    return lambda qkv: attend(*qkv.unbind(1))


def _flash_attn(packing: Packing) -> Attend:
    from flash_attn import flash_attn_varlen_qkvpacked_func

    return lambda qkv: flash_attn_varlen_qkvpacked_func(qkv, packing.cu_seqlens, packing.max_seqlen)


def _xformers(packing: Packing) -> Attend:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    bias = BlockDiagonalMask.from_seqlens(packing.cu_seqlens.diff().tolist())
    return lambda q, k, v: memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]


def packed_block_mask(packing: Packing):
    """FlexAttention's mask of the packed sequences, from their bounds.

    `create_block_mask` would hold every pair of tokens, 16 GB of them for a large predictor batch.
    """
    from torch.nn.attention.flex_attention import BlockMask

    sequence, bounds, total = packing.sequence_ids, packing.cu_seqlens, packing.capacity
    blocks = torch.arange(-(-total // FLEX_BLOCK), device=bounds.device)
    first = sequence[blocks * FLEX_BLOCK].long()
    last = sequence[((blocks + 1) * FLEX_BLOCK).clamp(max=total) - 1].long()
    lowest, highest = bounds[first] // FLEX_BLOCK, (bounds[last + 1] - 1) // FLEX_BLOCK
    touched = (blocks >= lowest[:, None]) & (blocks <= highest[:, None])  # (Q, K)
    whole = (first == last) & ((blocks + 1) * FLEX_BLOCK <= total)
    full = whole[:, None] & whole & (first[:, None] == first)

    def listed(pairs: Tensor) -> tuple[Tensor, Tensor]:
        """How many key blocks a query block has, and which, those first."""
        order = pairs.int().argsort(dim=1, descending=True, stable=True)
        return pairs.sum(1).int()[None, None], order.int()[None, None].contiguous()

    return BlockMask.from_kv_blocks(
        *listed(touched & ~full),
        *listed(full),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=lambda b, h, i, j: sequence[i] == sequence[j],
        seq_lengths=(total, total),
    )


def _flex(packing: Packing) -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    mask = packed_block_mask(packing)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(*qkv: Tensor) -> Tensor:
        q, k, v = (part.transpose(0, 1)[None] for part in qkv)
        return compiled(q, k, v, block_mask=mask)[0].transpose(0, 1)

    return attend


def _jagged(packing: Packing) -> Attend:
    offsets = packing.cu_seqlens.long()
    # both bounds, or every call would read them back from the device
    shortest, longest = int(offsets.diff().min()), packing.max_seqlen

    def attend(*qkv: Tensor) -> Tensor:
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(
                part, offsets, min_seqlen=shortest, max_seqlen=longest
            ).transpose(1, 2)
            for part in qkv
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values()

    return attend


def _sdpa_masked(packing: Packing) -> Attend:
    """Padded to the longest, with a mask; padding and unpadding are part of the price."""
    lengths = packing.cu_seqlens.diff()
    columns = torch.arange(packing.max_seqlen, device=lengths.device)
    valid = columns < lengths[:, None]  # (S, N)
    rows = (packing.cu_seqlens[:-1, None] + columns).clamp(max=packing.capacity - 1)
    mask = valid[:, None, None, :]
    places = valid.flatten().nonzero()[:, 0]

    def attend(*qkv: Tensor) -> Tensor:
        q, k, v = (part[rows].transpose(1, 2) for part in qkv)  # (S, H, N, D) each
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(0, 1)[places]

    return attend


def _sdpa_by_sequence(packing: Packing) -> Attend:
    bounds = list(pairwise(packing.cu_seqlens.tolist()))

    def attend(*qkv: Tensor) -> Tensor:
        outputs = []
        for a, b in bounds:
            q, k, v = (part[a:b].transpose(0, 1)[None] for part in qkv)
            outputs.append(F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1))
        return torch.cat(outputs)

    return attend


def _sdpa_equal(backend: SDPBackend | None) -> Callable[[Packing], Attend]:
    """Dense (S, N, H, D) attention by one backend of SDPA; `max_seqlen` is every length."""

    def build(packing: Packing) -> Attend:
        def attend(*qkv: Tensor) -> Tensor:
            shape = (packing.num_sequences, packing.max_seqlen, *qkv[0].shape[1:])
            q, k, v = (part.view(shape).transpose(1, 2) for part in qkv)
            with sdpa_kernel(backend) if backend else contextlib.nullcontext():
                out = F.scaled_dot_product_attention(q, k, v)
            return out.transpose(1, 2).flatten(0, 1)

        return attend

    return build


OF_QKV = ("ours", "torch varlen_attn, of qkv", "flash_attn")  # what takes one buffer
UNCAPTURABLE = ("jagged nested tensor",)
PACKED_PEERS = {
    "torch varlen_attn": _torch_varlen,
    "torch varlen_attn, of qkv": _torch_varlen_of_qkv,
    "jagged nested tensor": _jagged,
    "SDPA padded with a mask": _sdpa_masked,
}
DENSE_PEERS = {
    "SDPA flash": _sdpa_equal(SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": _sdpa_equal(SDPBackend.CUDNN_ATTENTION),
    "torch varlen_attn": _torch_varlen,
}
for _name, _build in (("flash_attn", _flash_attn), ("xformers", _xformers)):
    if importlib.util.find_spec(_name):
        PACKED_PEERS[_name] = DENSE_PEERS[_name] = _build
CPU_PACKED_PEERS = {
    "SDPA padded with a mask": _sdpa_masked,
    "SDPA, one call a sequence": _sdpa_by_sequence,
}
CPU_DENSE_PEERS = {"SDPA": _sdpa_equal(None)}
FLEX = {"FlexAttention, compiled": _flex}


def _leaves(sample: dict, name: str) -> list[Tensor]:
    """What a provider of that name takes: the one buffer, or its three parts."""
    return [sample["qkv"]] if name in OF_QKV else sample["parts"]


def _accepted(build: Callable[[Packing], Attend], packing: Packing, sample: dict, name: str):
    """The peer, if it is there and runs this shape forward and backward; else None."""
    try:
        attend, leaves = build(packing), _leaves(sample, name)
        out = attend(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    except Exception as error:  # whatever a peer may raise: the others are still to be timed
        print(f"  left out: {name}: {str(error).splitlines()[:1]}")
        return None
    return attend


def _bench(shape: Shape, part: str, device: str, peers: dict) -> None:
    """Forward and backward tables of one shape."""
    width = shape.predictor_width if part == "predictor" else shape.width
    heads = HEADS[shape.name[0]]
    head_dim = width // heads
    packing, dtype = packed_part(shape, part).to(device), DTYPES[device]
    total = packing.capacity

    def make_inputs() -> dict:
        qkv = torch.randn(total, 3, heads, head_dim, device=device, dtype=dtype)
        parts = [x.contiguous().requires_grad_() for x in qkv.unbind(1)]
        return {"qkv": qkv.requires_grad_(), "parts": parts}

    sample = make_inputs()
    built = {"ours": _ours(packing), "ours, apart": _ours_apart(packing)}
    for name, build in peers.items():
        if attend := _accepted(build, packing, sample, name):
            built[name] = attend
    row_bytes = total * heads * head_dim * dtype.itemsize
    facts = {
        "op": "attention", "shape": f"{shape.name} {part}", "part": part, "head_dim": head_dim,
        "longest": packing.max_seqlen, "equal_lengths": part in ("target", "padded"),
    }  # fmt: skip

    def forward_of(name: str, attend: Attend):
        return lambda s: lambda: attend(*(x.detach() for x in _leaves(s, name)))

    forwards = {name: forward_of(name, attend) for name, attend in built.items()}

    def backward_of_leaves(name: str, attend: Attend):
        return lambda s: backward_of(attend, _leaves(s, name))

    backwards = {name: backward_of_leaves(name, attend) for name, attend in built.items()}
    known = _backward_facts(backwards["ours"](make_inputs()), row_bytes, device)
    with_flex = ", Flex" if peers is FLEX else ""
    for direction, providers, rows, more in (
        ("forward", forwards, FORWARD_ROWS, {}),
        ("backward", backwards, BACKWARD_ROWS, known),
    ):
        compare(
            f"attention {direction} {shape.name} {part} D={head_dim}{with_flex}", providers,
            make_inputs, rows * row_bytes, device, facts={**facts, "direction": direction, **more},
            uncapturable=UNCAPTURABLE,
        )  # fmt: skip


def _backward_facts(backward: Callable[[], tuple], row_bytes: int, device: str) -> dict:
    """Whether repeated backwards are bitwise equal; on a GPU what one allocates besides gradients.

    A float32 gradient of the queries would take two `row_bytes` of half precision.
    """
    (first,) = backward()
    facts = {"deterministic": all(torch.equal(first, backward()[0]) for _ in range(3))}
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        (gradient,) = backward()
        peak = torch.cuda.max_memory_allocated()
        facts["workspace_in_rows"] = (peak - before - gradient.nbytes) / row_bytes
    return facts


def packed_part(shape: Shape, part: str) -> Packing:
    if part == "target":
        return pack_lengths([shape.num_patches] * shape.batch)
    masks = shape.masks()
    if part == "padded":
        longest = int(masks.context_packing.cu_seqlens.diff().max())
        return pack_lengths([longest] * shape.batch)
    drawn = masks.context_packing if part == "context" else masks.predictor_packing
    return pack_lengths(drawn.cu_seqlens.diff().tolist())


PARTS = ("context", "predictor", "target")
CASES = [(device, shape, part) for device, shape in EVERY_SHAPE for part in PARTS]
if torch.cuda.is_available():
    CASES += [("cuda", G16, "context"), ("cuda", G16, "target"), ("cuda", L14, "target")]


def _test_id(value: object) -> str:
    return value.name if isinstance(value, Shape) else str(value)


@pytest.mark.parametrize(("device", "shape", "part"), CASES, ids=_test_id)
def test_attention(device, shape, part):
    dense = part == "target"
    if device == "cpu":
        peers = CPU_DENSE_PEERS if dense else CPU_PACKED_PEERS
    else:
        peers = DENSE_PEERS if dense else PACKED_PEERS
    _bench(shape, part, device, peers)


@pytest.mark.parametrize(("device", "shape", "part"), CASES, ids=_test_id)
def test_flex(device, shape, part):
    if device == "cpu":
        pytest.skip("FlexAttention has no backward on a CPU")
    _bench(shape, part, device, FLEX)


@pytest.mark.parametrize(("device", "shape"), EVERY_SHAPE[:1], ids=_test_id)
def test_padded_without_a_mask(device, shape):
    """What SDPA costs when padding is attended to: not the same result, for orientation only."""
    _bench(shape, "padded", device, DENSE_PEERS if device == "cuda" else CPU_DENSE_PEERS)
