"""One attention problem, run through the launch functions and held to float64.

Outputs are poisoned between canaries, padding rows of every input hold NaN, and sequences without
keys or queries are part of the lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from masked_vit_kernels import reference
from masked_vit_kernels.attention.backward import backward_launches
from masked_vit_kernels.attention.forward import forward_launch
from masked_vit_kernels.attention.sequences import Sequences
from masked_vit_kernels.packing import pack_lengths
from op_checks import assert_accurate, poison_tail, poisoned
from torch import Tensor

LENGTHS = {
    64: (15, 0, 64, 1, 63, 16, 17),
    128: (65, 128, 0, 63, 17, 1),
    256: (129, 197, 0, 256, 16, 65),
    300: (300, 0, 129, 64, 197, 15),
}


@dataclass(frozen=True)
class AttentionProblem:
    """lengths of queries and keys, and how the inputs lie in memory.

    layout: "separate" tensors, "qkv" or "kv" packed, "transposed" (H, T, D) memory, or "narrowed"
    (columns of a wider tensor whose other columns hold NaN). Equal lengths only for "qkv".
    """

    head_dim: int
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "separate"
    heads: int = 2
    key_heads: int | None = None  # fewer than `heads`: each serves several of the queries'
    maps: bool = True
    padding: int = 70
    device: str = "cpu"


def problem(head_dim: int, longest: int, dtype: torch.dtype, layout: str, **others):
    """A problem over one of the `LENGTHS`; the keys' lengths are the queries' in another order."""
    lengths = LENGTHS[longest]
    keys = lengths if layout == "qkv" else lengths[1:] + lengths[:1]
    return AttentionProblem(head_dim, lengths, keys, dtype, layout, **others)


def _views(case: AttentionProblem, rows_q: int, rows_k: int) -> tuple[Tensor, ...]:
    """q, k and v as views in the memory layout of the case."""
    heads, width = case.heads, case.head_dim
    key_heads = case.key_heads or heads

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=case.device).to(case.dtype)

    if case.layout == "qkv":
        return randn(rows_q, 3, heads, width).unbind(1)
    if case.layout == "kv":
        return randn(rows_q, heads, width), *randn(rows_k, 2, key_heads, width).unbind(1)
    if case.layout == "transposed":
        return tuple(randn(heads, rows, width).transpose(0, 1) for rows in (rows_q, rows_k, rows_k))
    if case.layout == "narrowed":
        wide = [randn(rows, heads, width + 16) for rows in (rows_q, rows_k, rows_k)]
        for tensor in wide:
            tensor[..., :8] = tensor[..., width + 8 :] = float("nan")
        return tuple(tensor[..., 8 : width + 8] for tensor in wide)
    return randn(rows_q, heads, width), *(randn(rows_k, key_heads, width) for _ in range(2))


def _eager(q: Tensor, k: Tensor, v: Tensor, bounds_q: list, bounds_k: list, scale: float) -> Tensor:
    """The same attention in the inputs' own dtype, every intermediate rounded."""
    outputs = []
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    for (a, b), (c, d) in zip(pairwise(bounds_q), pairwise(bounds_k), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * scale
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[c:d]))
    return torch.cat(outputs)


def check_attention(
    case: AttentionProblem, *, config=None, plan=None, capability=None
) -> dict[str, Tensor]:
    """Forward, LSE and gradients of one problem against float64; returns the results.

    Tiles: those given, or those of a capability's launch table (default: the device's, or 90).
    """
    scale = 1.3 * case.head_dim**-0.5
    totals = sum(case.lengths_q), sum(case.lengths_k)
    packing_q, packing_k = (
        pack_lengths(lengths, capacity=sum(lengths) + case.padding).to(case.device)
        for lengths in (case.lengths_q, case.lengths_k)
    )
    rows_q, rows_k = packing_q.capacity, packing_k.capacity
    q, k, v = _views(case, rows_q, rows_k)
    dout = torch.randn(rows_q, case.heads, case.head_dim, device=case.device).to(case.dtype)
    for tensor, total in ((q, totals[0]), (dout, totals[0]), (k, totals[1]), (v, totals[1])):
        poison_tail(tensor, total)

    shape_q, shape_k = tuple(q.shape), (k.shape[0], *q.shape[1:])  # a part from every query's head
    buffers = {
        name: poisoned(*shape, dtype=case.dtype, device=case.device)
        for name, shape in (("out", shape_q), ("dq", shape_q), ("dk", shape_k), ("dv", shape_k))
    }
    buffers["lse"] = poisoned(case.heads, rows_q, device=case.device)
    delta = poisoned(case.heads, rows_q, device=case.device)
    queries, keys = (
        Sequences.of(packing.cu_seqlens, packing.max_seqlen, packing if case.maps else None)
        for packing in (packing_q, packing_k)
    )
    given = {
        "q": q, "k": k, "v": v, "out": buffers["out"].tensor, "lse": buffers["lse"].tensor,
        "queries": queries, "keys": keys, "softmax_scale": scale,
    }  # fmt: skip
    forward_launch(**given, config=config, capability=capability).run()
    for launch in backward_launches(
        **given, dout=dout, delta=delta.tensor, dq=buffers["dq"].tensor, dk=buffers["dk"].tensor,
        dv=buffers["dv"].tensor, plan=plan, capability=capability,
    ):  # fmt: skip
        launch.run()
    results = {name: buffer.check() for name, buffer in buffers.items()}
    for name in ("dk", "dv"):
        results[name] = results[name].unflatten(1, (k.shape[1], -1)).sum(2)
    _compare(case, results, q, k, v, dout, packing_q.cu_seqlens, packing_k.cu_seqlens, scale)
    return results


def _compare(case, results, q, k, v, dout, cu_seqlens_q, cu_seqlens_k, scale) -> None:
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.cpu(), cu_seqlens_k.cpu()
    total_q, total_k = int(cu_seqlens_q[-1]), int(cu_seqlens_k[-1])
    leaves = [x[:n].cpu().double() for x, n in ((q, total_q), (k, total_k), (v, total_k))]
    exact_inputs = q, k, v = [x.requires_grad_() for x in leaves]
    out, lse = reference.varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale=scale)
    upstream = dout[:total_q].cpu()
    exact = dict(out=out.detach(), lse=lse.detach())
    exact |= zip(
        ("dq", "dk", "dv"), torch.autograd.grad(out, exact_inputs, upstream.double()), strict=True
    )
    eager_inputs = q, k, v = [x.detach().to(case.dtype).requires_grad_() for x in leaves]
    out = _eager(q, k, v, cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), scale)
    eager = dict(out=out.detach())
    eager |= zip(("dq", "dk", "dv"), torch.autograd.grad(out, eager_inputs, upstream), strict=True)
    for name, count in (("out", total_q), ("dq", total_q), ("dk", total_k), ("dv", total_k)):
        assert_accurate(name, results[name][:count], exact[name], eager[name])
        assert (results[name][count:] == 0).all(), f"{name} is not zero on padding rows"
    found = results["lse"].cpu()
    assert (found[:, total_q:] == -torch.inf).all(), "lse is not -inf on padding rows"
    found, empty = found[:, :total_q], exact["lse"] == -torch.inf
    assert (found[empty] == -torch.inf).all(), "lse is not -inf without keys"
    if not empty.all():
        tolerance = 1e-5 if case.dtype == torch.float32 else 2e-3
        error = (found[~empty].double() - exact["lse"][~empty]).abs().max()
        assert error <= tolerance, f"lse: error {float(error):.3g}"
