"""Variable-length attention over packed tokens: `varlen_attention` and its packed-input variants.

Semantics: `reference.varlen_attention`. Arguments are checked once, wherever the op then runs: CPU
tensors in `cpu.py`, everything else in the Triton kernels of `forward.py` and `backward.py` through
two opaque ops, which trace, compile and capture. Names and layouts follow flash-attn's varlen
functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from masked_vit_kernels.attention import cpu as cpu_attention
from masked_vit_kernels.attention.arguments import Side, check_attention, check_bound
from masked_vit_kernels.attention.backward import backward_launches, backward_scratch
from masked_vit_kernels.attention.flash_keywords import check_flash_attn_keywords
from masked_vit_kernels.attention.forward import forward_launch
from masked_vit_kernels.attention.sequences import Sequences
from masked_vit_kernels.attention.tiles import readable
from masked_vit_kernels.checks import (
    TRITON_DTYPES,
    check_dtype,
    check_same_device,
    check_shape,
)
from masked_vit_kernels.launch import runs_kernels
from masked_vit_kernels.packing import Packing

# The inputs of both ops are `x`, `y`, `z`: qkv alone, or q and kv, or q, k and v.


def _split(x: Tensor, y: Tensor | None, z: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Views q, k, v, each (T, H, D), of whichever inputs there are."""
    if y is None:
        return x[:, 0], x[:, 1], x[:, 2]
    if z is None:
        return x, y[:, 0], y[:, 1]
    return x, y, z


@torch.library.custom_op("masked_vit_kernels::varlen_attention", mutates_args=())
def _attention(
    x: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    tile_map_q: Tensor | None,
    wide_tile_map_q: Tensor | None,
    tile_map_k: Tensor | None,
    wide_tile_map_k: Tensor | None,
    sequence_order: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """-> out (Tq, H, D), lse (H, Tq) fp32. The last maps are for the backward."""
    q, k, v = (readable(part) for part in _split(x, y, z))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    forward_launch(
        q=q, k=k, v=v, out=out, lse=lse,
        queries=Sequences(
            cu_seqlens=cu_seqlens_q, max_seqlen=max_seqlen_q, tile_map=tile_map_q,
            wide_tile_map=wide_tile_map_q,
        ),
        keys=Sequences(cu_seqlens=cu_seqlens_k, max_seqlen=max_seqlen_k),
        softmax_scale=softmax_scale,
    ).run()  # fmt: skip
    return out, lse


@_attention.register_fake
def _(x, y, z, *_):
    q = _split(x, y, z)[0]
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("masked_vit_kernels::varlen_attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    x: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    tile_map_q: Tensor | None,
    tile_map_k: Tensor | None,
    wide_tile_map_k: Tensor | None,
    sequence_order: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
) -> list[Tensor]:
    """-> one gradient buffer for each of the inputs x, y, z that is given."""
    q, k, v = (readable(part) for part in _split(x, y, z))
    gradients = [
        torch.empty(part.shape, dtype=part.dtype, device=part.device)
        for part in (x, y, z)
        if part is not None
    ]
    dq, dk, dv = _split(*gradients, *[None] * (3 - len(gradients)))
    grouped = q.shape[1] != k.shape[1]
    # Heads that share keys write their parts side by side: added afterwards, always in one order.
    dk_parts, dv_parts = (
        x.new_empty(x.shape[0], *q.shape[1:]) if grouped else x for x in (dk, dv)
    )
    launches = backward_launches(
        q=q, k=k, v=v, out=out, dout=readable(dout), lse=lse, delta=backward_scratch(q),
        dq=dq, dk=dk_parts, dv=dv_parts,
        queries=Sequences(
            cu_seqlens=cu_seqlens_q, max_seqlen=max_seqlen_q, tile_map=tile_map_q
        ),
        keys=Sequences(
            cu_seqlens=cu_seqlens_k, max_seqlen=max_seqlen_k, tile_map=tile_map_k,
            wide_tile_map=wide_tile_map_k, order=sequence_order,
        ),
        softmax_scale=softmax_scale,
    )  # fmt: skip
    for launch in launches:
        launch.run()
    if grouped:
        for total, parts in ((dk, dk_parts), (dv, dv_parts)):
            total.copy_(parts.unflatten(1, (total.shape[1], -1)).sum(2))
    return gradients


@_attention_backward.register_fake
def _(dout, out, lse, x, y, z, *_):
    return [part.new_empty(part.shape) for part in (x, y, z) if part is not None]


def _setup_context(ctx, inputs, output):
    x, y, z, cu_q, cu_k, map_q, _, map_k, wide_map_k, order, *ctx.numbers = inputs
    out, lse = output
    ctx.save_for_backward(x, y, z, cu_q, cu_k, map_q, map_k, wide_map_k, order, out, lse)
    ctx.mark_non_differentiable(lse)


def _backward(ctx, dout, _dlse):
    x, y, z, cu_q, cu_k, map_q, map_k, wide_map_k, order, out, lse = ctx.saved_tensors
    gradients = _attention_backward(
        dout, out, lse, x, y, z, cu_q, cu_k, map_q, map_k, wide_map_k, order, *ctx.numbers
    )
    return (*gradients, *[None] * (13 - len(gradients)))


_attention.register_autograd(_backward, setup_context=_setup_context)

_autocast_library = torch.library.Library("masked_vit_kernels", "FRAGMENT")


def _register_autocast(device_type: str) -> None:
    """Cast the inputs to whatever dtype autocast holds; `register_autocast` takes a fixed one."""
    key = {"cuda": "AutocastCUDA", "cpu": "AutocastCPU"}[device_type]

    def kernel(x, y, z, *others):
        dtype = torch.get_autocast_dtype(device_type)
        x, y, z = (None if part is None else part.to(dtype) for part in (x, y, z))
        with torch.amp.autocast(device_type, enabled=False):
            return _attention(x, y, z, *others)

    _autocast_library.impl("varlen_attention", kernel, key)


_register_autocast("cuda")
_register_autocast("cpu")


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    packing_q: Packing | None = None,
    packing_k: Packing | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    **flash_attn: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each sequence's queries over its own keys.

    Args:
        q: (Tq, H, D), D a multiple of 8 up to 128; float32, float16 or bfloat16, on the CPU also
            float64. Strided views are read in place where their strides are multiples of 8.
        k, v: (Tk, Hk, D); H is Hk, or a multiple of it whose heads in a row share keys and values
            (grouped queries).
        cu_seqlens_q, cu_seqlens_k: (S + 1,) int32, first row of each sequence.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths.
        packing_q, packing_k: the same sequences as `Packing`s, whose tile maps keep long and short
            sequences balanced; without them the grid covers the upper bounds.
        softmax_scale: positive and finite; default: D ** -0.5.
        return_lse: also return the LSE.
        flash_attn: flash-attn's other keywords at the values at which they change nothing
            (`causal=False, dropout_p=0.0, window_size=(-1, -1), softcap=0.0, ...`), and
            `deterministic`, which the backward always is.

    Returns:
        (Tq, H, D) in q's dtype, zero on padding rows and where a sequence has no keys; with
        `return_lse` also (H, Tq) fp32 natural-log LSE, -inf there, not differentiable.

    Raises:
        ValueError: wrong shapes, dtypes, devices or scale. Sequences that leave the rows, exceed
            their bound or are not the packing's: on the CPU; on a GPU where
            MASKED_VIT_KERNELS_CHECK=1 lets them be looked at, else they are not noticed.
    """
    check_flash_attn_keywords(flash_attn)
    check_shape("q", q, (None, None, None), "(Tq, H, D)")
    check_shape("k", k, (None, None, q.shape[2]), f"(Tk, Hk, {q.shape[2]})")
    check_shape("v", v, k.shape, f"{tuple(k.shape)} like k")
    queries = Side("q", q.shape[0], cu_seqlens_q, max_seqlen_q, packing_q)
    keys = Side("k", k.shape[0], cu_seqlens_k, max_seqlen_k, packing_k)
    return _attend((q, k, v), (queries, keys), softmax_scale, return_lse)


def varlen_attention_qkvpacked(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    packing: Packing | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    **flash_attn: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """`varlen_attention` of qkv (T, 3, H, D), whose gradient is one (T, 3, H, D) buffer."""
    check_flash_attn_keywords(flash_attn)
    check_shape("qkv", qkv, (None, 3, None, None), "(T, 3, H, D)")
    both = Side("", qkv.shape[0], cu_seqlens, max_seqlen, packing)
    return _attend((qkv,), (both,), softmax_scale, return_lse)


def varlen_attention_kvpacked(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    packing_q: Packing | None = None,
    packing_k: Packing | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    **flash_attn: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """`varlen_attention` of q (Tq, H, D) and kv (Tk, 2, Hk, D), whose gradient is one buffer."""
    check_flash_attn_keywords(flash_attn)
    check_shape("q", q, (None, None, None), "(Tq, H, D)")
    check_shape("kv", kv, (None, 2, None, q.shape[2]), f"(Tk, 2, Hk, {q.shape[2]})")
    queries = Side("q", q.shape[0], cu_seqlens_q, max_seqlen_q, packing_q)
    keys = Side("k", kv.shape[0], cu_seqlens_k, max_seqlen_k, packing_k)
    return _attend((q, kv), (queries, keys), softmax_scale, return_lse)


def _attend(
    inputs: tuple[Tensor, ...],
    sides: tuple[Side, ...],
    softmax_scale: float | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Behind the public functions: (qkv,), (q, kv) or (q, k, v), checked here and dispatched.

    sides: of the queries and of the keys, or one for both.
    """
    for side in sides:
        _check_packing(side)
    queries, keys = (
        Sequences.of(side.cu_seqlens, side.max_seqlen, side.packing)
        for side in (sides[0], sides[-1])
    )
    x, y, z = inputs[0], *(*inputs[1:], None, None)[:2]
    q, k, _ = _split(x, y, z)
    _check(inputs, q, k, queries, keys)
    check_attention(q.shape[2], softmax_scale, *sides)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if not runs_kernels(q.device):
        out, lse = cpu_attention.attend(inputs, queries.cu_seqlens, keys.cu_seqlens, scale)
        return (out, lse) if return_lse else out
    for tensor in inputs:
        check_dtype("the attention's inputs", tensor)
    out, lse = _attention(
        x,
        y,
        z,
        cu_seqlens_q=queries.cu_seqlens,
        cu_seqlens_k=keys.cu_seqlens,
        tile_map_q=queries.tile_map,
        wide_tile_map_q=queries.wide_tile_map,
        tile_map_k=keys.tile_map,
        wide_tile_map_k=keys.wide_tile_map,
        sequence_order=keys.order,
        max_seqlen_q=queries.max_seqlen,
        max_seqlen_k=keys.max_seqlen,
        softmax_scale=scale,
    )
    return (out, lse) if return_lse else out


def _check(
    inputs: tuple[Tensor, ...],
    q: Tensor,
    k: Tensor,
    queries: Sequences,
    keys: Sequences,
) -> None:
    """What holds on every device."""
    if q.shape[1] < 1:  # torch's CPU attention ends the process over none
        raise ValueError(f"H must be at least 1, got {q.shape[1]}")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(
            "the heads of q must be those of k and v or a multiple of them, got "
            f"{q.shape[1]} and {k.shape[1]}"
        )
    for tensor in inputs:
        check_dtype("the attention's inputs", tensor, (*TRITON_DTYPES, torch.float64))
    if len({tensor.dtype for tensor in inputs}) > 1:
        raise ValueError(f"inputs must share a dtype, got {[x.dtype for x in inputs]}")
    for name, side in (("cu_seqlens_q", queries), ("cu_seqlens_k", keys)):
        check_shape(name, side.cu_seqlens, (None,), "(S + 1,)")
        check_dtype(name, side.cu_seqlens, (torch.int32, torch.int64))
    if queries.count != keys.count:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must describe as many sequences, "
            f"got {queries.count} and {keys.count}"
        )
    check_same_device("q", q, k=k, cu_seqlens_q=queries.cu_seqlens, cu_seqlens_k=keys.cu_seqlens)


def _check_packing(side: Side) -> None:
    packing = side.packing
    if packing is None:
        return
    if not isinstance(packing, Packing):
        kind = type(packing).__name__
        raise TypeError(f"packing{side.suffix} must be a Packing, got {kind}")
    check_bound(side)
    if packing.capacity != side.rows or packing.max_seqlen > side.max_seqlen:
        raise ValueError(
            f"packing{side.suffix} describes {packing.capacity} rows in sequences up to "
            f"{packing.max_seqlen}, got {side.rows} rows and max_seqlen {side.max_seqlen}"
        )
