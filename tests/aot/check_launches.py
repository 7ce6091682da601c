"""The C library launches what Python launches: every op, random sizes, every architecture built.

For each op the Python launch function builds its launches from tensors, and the C function is
called with the same tensors' addresses under the fake driver. Cubins, grids, blocks, shared memory
and every kernel parameter must be equal.
"""

from __future__ import annotations

import functools
import itertools
import random
import struct
from unittest import mock

import pytest
import torch
from aot_build import ARCHS, FAKE, LIBRARY, bundled_cubin
from c_api import cubin_hash as slow_cubin_hash
from masked_vit_kernels import pack_lengths
from masked_vit_kernels.attention.backward import backward_launches
from masked_vit_kernels.attention.forward import forward_launch
from masked_vit_kernels.attention.sequences import Sequences
from masked_vit_kernels.catalogue.sizes import ENCODER_WIDTHS, HEAD_DIMS
from masked_vit_kernels.compile import specialize_launch
from masked_vit_kernels.launch import KernelLaunch
from masked_vit_kernels.optimizer import ema
from masked_vit_kernels.optimizer import launches as adamw_ema_launch
from masked_vit_kernels.tokens import (
    gather_kernels,
    prediction_loss,
    prediction_loss_kernels,
    predictor_tokens,
    sum_by_place,
)
from masked_vit_kernels.tokens import patch_embed_kernels as embed
from masked_vit_kernels.tokens.rows import RowIndex
from torch import Tensor

cubin_hash = functools.cache(slow_cubin_hash)

DRAWS = 30
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HALVES = FLOATS[1:]
LENGTHS = (1, 17, 63, 64, 65, 100, 128, 129, 197, 256, 257, 300, 784)


def expect(capability: int, expected: list[KernelLaunch]) -> None:
    """The fake driver has seen these very launches, with nothing between them."""
    seen = FAKE.launches()
    assert len(seen) == len(expected)
    for ours, theirs in zip(seen, expected, strict=True):
        source = specialize_launch(theirs, capability).src
        cubin, metadata = bundled_cubin(theirs, capability)
        assert ours.symbol.decode() == source.name
        assert ours.cubin_hash == cubin_hash(cubin)
        assert tuple(ours.grid) == (*theirs.grid, 1, 1)[:3]
        assert tuple(ours.block) == (32 * theirs.num_warps, 1, 1)
        assert ours.shared_bytes == metadata["shared"]
        assert ours.stream == 77
        values = [theirs.arguments[n] for n, ty in source.signature.items() if ty != "constexpr"]
        types = [ty for ty in source.signature.values() if ty != "constexpr"]
        assert ours.num_parameters == len(values) + 2
        given = [bytes(ours.values[i][: ours.sizes[i]]) for i in range(ours.num_parameters)]
        assert given[-2:] == [bytes(8), bytes(8)]
        for raw, value, ty in zip(given, values, types, strict=False):
            assert raw == _packed(value, ty), (source.name, ty, value)


def _packed(value: object, ty: str) -> bytes:
    if isinstance(value, Tensor):
        return struct.pack("<Q", value.data_ptr())
    return struct.pack({"i32": "<i", "i64": "<q", "fp32": "<f"}[ty], value)


@pytest.fixture(params=[(a, seed) for a in ARCHS for seed in range(DRAWS)], ids=str)
def drawn(request):
    """(capability, random numbers), with a driver that has seen nothing."""
    capability, seed = request.param
    FAKE.reset(capability)
    return capability, random.Random(seed)


def _ids(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _index(draw: random.Random, batch: int, tokens: int, every: bool):
    """(RowIndex, fields of the C struct), of a layout drawn."""
    layout = draw.choice(["every", "dense", "packed"][0 if every else 1 :])
    if layout == "every":
        index = RowIndex(None, None, tokens, 1)
        rows = batch * tokens
    elif layout == "dense":
        kept = draw.randint(1, tokens)
        rows = batch * kept
        index = RowIndex(_ids(rows), None, kept, 1)
    else:
        rows = draw.randint(1, 3 * tokens)
        index = RowIndex(_ids(rows), _ids(rows, dtype=torch.int32), 1, draw.choice([1, 3, 4]))
    c_index = LIBRARY.struct(
        "mvk_row_index", num_rows=rows, num_tokens=tokens,
        **{k: getattr(index, k) for k in index._fields if getattr(index, k) is not None},
    )  # fmt: skip
    return index, rows, c_index


def _attention(draw: random.Random, dtype=None, dim=None, limits=None):
    """Packed qkv of drawn lengths, with the fields that forward and backward share."""
    dtype, dim = dtype or draw.choice(HALVES), dim or draw.choice(HEAD_DIMS)
    heads = draw.choice([1, 3, 6, 12, 16])
    limit_q, limit_k = limits or (draw.choice(LENGTHS), draw.choice(LENGTHS))
    sequences = draw.randint(1, 6)
    packings = [
        pack_lengths([draw.randint(0, limit) for _ in range(sequences)], max_seqlen=limit,
                     capacity=6 * limit + 7)
        for limit in (limit_q, limit_k)
    ]  # fmt: skip
    q = torch.empty(packings[0].capacity, heads, dim, dtype=dtype)
    kv = torch.empty(packings[1].capacity, 2, heads, dim, dtype=dtype)
    shared = {
        "dtype": dtype, "head_dim": dim, "num_heads": heads, "num_sequences": sequences,
        "rows_q": q.shape[0], "max_seqlen_q": limit_q, "max_seqlen_k": limit_k,
        "softmax_scale": dim**-0.5, "q": q, "k": kv[:, 0], "v": kv[:, 1],
        "stride_q": q.stride(0), "stride_k": kv.stride(0), "stride_v": kv.stride(0),
        "cu_seqlens_q": packings[0].cu_seqlens, "cu_seqlens_k": packings[1].cu_seqlens,
    }  # fmt: skip
    return q, *kv.unbind(1), *packings, shared


def _sides(packing_q, packing_k, *, mapped: bool) -> tuple[Sequences, Sequences]:
    """Queries and keys with the maps of their packings or without."""
    queries, keys = (
        Sequences.of(packing.cu_seqlens, packing.max_seqlen, packing if mapped else None)
        for packing in (packing_q, packing_k)
    )
    return queries, keys


def test_attention_forward(drawn):
    _forward_alike(*drawn)


def _forward_alike(capability: int, draw: random.Random, **chosen) -> None:
    q, k, v, packing_q, packing_k, fields = _attention(draw, **chosen)
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], q.shape[0])
    queries, keys = _sides(packing_q, packing_k, mapped=draw.random() < 0.5)
    if queries.tile_map is not None:
        fields |= {
            "tile_map_q": packing_q.tile_map, "num_tiles_q": len(packing_q.tile_map),
            "wide_tile_map_q": packing_q.wide_tile_map,
            "num_wide_tiles_q": len(packing_q.wide_tile_map),
        }  # fmt: skip
    LIBRARY.run("attention_forward", out=out, lse=lse, stride_out=out.stride(0), **fields)
    launch = forward_launch(
        q=q, k=k, v=v, out=out, lse=lse, queries=queries, keys=keys,
        softmax_scale=fields["softmax_scale"], capability=capability,
    )  # fmt: skip
    expect(capability, [launch])


def test_attention_backward(drawn):
    _backward_alike(*drawn)


def _backward_alike(capability: int, draw: random.Random, **chosen) -> None:
    q, k, v, packing_q, packing_k, fields = _attention(draw, **chosen)
    out, dout, dq = (torch.empty_like(q) for _ in range(3))
    dk, dv = torch.empty(k.shape[0], 2, *k.shape[1:], dtype=k.dtype).unbind(1)
    lse, delta = (torch.empty(q.shape[1], q.shape[0]) for _ in range(2))
    queries, keys = _sides(packing_q, packing_k, mapped=draw.random() < 0.5)
    if keys.order is not None:
        fields |= {
            "sequence_order": packing_k.sequence_order,
            "tile_map_q": packing_q.tile_map, "num_tiles_q": len(packing_q.tile_map),
            "tile_map_k": packing_k.tile_map, "num_tiles_k": len(packing_k.tile_map),
            "wide_tile_map_k": packing_k.wide_tile_map,
            "num_wide_tiles_k": len(packing_k.wide_tile_map),
        }  # fmt: skip
    LIBRARY.run(
        "attention_backward", rows_k=k.shape[0], out=out, dout=dout, lse=lse, delta=delta,
        dq=dq, dk=dk, dv=dv, stride_out=out.stride(0), stride_dout=dout.stride(0),
        stride_dq=dq.stride(0), stride_dk=dk.stride(0), stride_dv=dv.stride(0), **fields,
    )  # fmt: skip
    launches = backward_launches(
        q=q, k=k, v=v, out=out, dout=dout, lse=lse, delta=delta, dq=dq, dk=dk, dv=dv,
        queries=queries, keys=keys, softmax_scale=fields["softmax_scale"], capability=capability,
    )  # fmt: skip
    expect(capability, launches)


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("capability", ARCHS)
def test_attention_on_both_sides_of_every_length_the_tables_know(capability, dtype, dim):
    """Each pair of lengths with tile maps and without, which is what the draw of 0 or 1 decides."""
    draw = random.Random(1)
    for limits in itertools.product((64, 65, 128, 129), (64, 65, 128, 129, 256, 257)):
        for alike in (_forward_alike, _backward_alike):
            for without_maps in (0, 1):
                FAKE.reset(capability)
                with mock.patch.object(draw, "random", lambda value=without_maps: value):
                    alike(capability, draw, dtype=dtype, dim=dim, limits=limits)


def test_a_map_longer_than_a_grid_axis(drawn):
    capability, _ = drawn
    tiles = torch.empty(200_000, 2, dtype=torch.int32)
    q, lse = torch.empty(64, 2, 64, dtype=torch.float16), torch.empty(2, 64)
    cu_seqlens = torch.zeros(2, dtype=torch.int32)
    LIBRARY.run(
        "attention_forward", dtype=q.dtype, head_dim=64, num_heads=2, num_sequences=1, rows_q=64,
        max_seqlen_q=64, max_seqlen_k=64, softmax_scale=0.125, q=q, k=q, v=q, out=q, lse=lse,
        stride_q=128, stride_k=128, stride_v=128, stride_out=128, cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens, tile_map_q=tiles, wide_tile_map_q=tiles,
        num_tiles_q=len(tiles), num_wide_tiles_q=len(tiles),
    )  # fmt: skip
    both = Sequences(
        cu_seqlens=cu_seqlens, max_seqlen=64, tile_map=tiles, wide_tile_map=tiles
    )  # fmt: skip
    launch = forward_launch(
        q=q, k=q, v=q, out=q, lse=lse, queries=both, keys=both, softmax_scale=0.125,
        capability=capability,
    )  # fmt: skip
    assert launch.grid[2] > 1
    expect(capability, [launch])


@pytest.mark.parametrize("capability", ARCHS)
def test_gather_rows_of_every_size(capability):
    for seed, (dtype, width) in enumerate(itertools.product(FLOATS, ENCODER_WIDTHS * 6)):
        FAKE.reset(capability)
        _gather_alike(capability, random.Random(seed), dtype, width)


def _gather_alike(capability: int, draw: random.Random, dtype: torch.dtype, width: int) -> None:
    tokens = draw.randint(1, 300)
    index, num_rows, c_index = _index(draw, 3, tokens, every=False)
    x = torch.empty(3, tokens, 2, width, dtype=dtype)[:, :, draw.randint(0, 1)]
    out = torch.empty(num_rows, width, dtype=dtype)
    LIBRARY.run("gather_rows", dtype=dtype, width=width, x=x, stride_image=x.stride(0),
                stride_token=x.stride(1), index=c_index, out=out)  # fmt: skip
    expect(capability, [gather_kernels.gather_rows_launch(x, index, out)])


def test_scatter_rows(drawn):
    capability, draw = drawn
    dtype, width, tokens = draw.choice(FLOATS), draw.choice(ENCODER_WIDTHS), draw.randint(1, 300)
    index, num_rows, c_index = _index(draw, 3, tokens, every=False)
    x, out = torch.empty(num_rows, width, dtype=dtype), torch.empty(3, tokens, width, dtype=dtype)
    fill = draw.choice([None, torch.empty(width, dtype=dtype).expand(out.shape), out.clone()])
    places = torch.empty(3 * tokens, dtype=torch.int32)
    fields = {} if fill is None else {
        "fill": fill, "stride_fill_image": fill.stride(0), "stride_fill_token": fill.stride(1)
    }  # fmt: skip
    LIBRARY.run("scatter_rows", dtype=dtype, width=width, num_images=3, x=x, index=c_index,
                stride_row=x.stride(0), place_to_row=places, out=out, **fields)  # fmt: skip
    expect(capability, [
        gather_kernels.invert_rows_launch(index, tokens, places),
        gather_kernels.scatter_rows_launch(x, fill, index, places, out),
    ])  # fmt: skip


def test_scatter_fill_gradient(drawn):
    capability, draw = drawn
    dtype, width, tokens = draw.choice(FLOATS), draw.choice(ENCODER_WIDTHS), draw.randint(1, 300)
    index, _, c_index = _index(draw, 3, tokens, every=False)
    grad = torch.empty(3, tokens, width, dtype=dtype)
    places = torch.empty(3 * tokens, dtype=torch.int32)
    chunks, inner = draw.choice([(1, 3 * tokens), (3, tokens), (7, 16)])
    partial = torch.empty(chunks, inner, width)
    LIBRARY.run("scatter_fill_gradient", dtype=dtype, width=width, num_images=3, grad=grad,
                index=c_index, place_to_row=places, chunks=chunks, inner=inner,
                partial=partial)  # fmt: skip
    expect(capability, [
        gather_kernels.invert_rows_launch(index, tokens, places),
        gather_kernels.fill_gradient_launch(grad, index, places, partial),
    ])  # fmt: skip


def test_sum_rows_by_place(drawn):
    capability, draw = drawn
    dtype, width, num_rows = draw.choice(FLOATS), draw.choice(ENCODER_WIDTHS), draw.randint(1, 900)
    num_places = max(1, num_rows // draw.choice([1, 3, 4, 5, 20]))
    values, out = (torch.empty(n, width, dtype=dtype) for n in (num_rows, num_places))
    order, starts = _ids(num_rows), _ids(num_places + 1)
    LIBRARY.run("sum_rows_by_place", dtype=dtype, width=width, num_rows=num_rows,
                num_places=num_places, values=values, stride_row=width, order=order, starts=starts,
                out=out)  # fmt: skip
    expect(capability, [sum_by_place.segmented_sum_launch(values, order, starts, out)])


def test_patch_rows(drawn):
    capability, draw = drawn
    size, patch = draw.choice([(224, 16), (224, 14), (448, 16)])
    tokens = (size // patch) ** 2
    image_dtype = draw.choice([torch.uint8, *HALVES])
    dtype = draw.choice(HALVES) if image_dtype == torch.uint8 else image_dtype
    index, num_rows, c_index = _index(draw, 2, tokens, every=True)
    images = torch.empty(2, 3, size, size, dtype=image_dtype)
    statistics = torch.empty(3) if image_dtype == torch.uint8 else None
    fields = {} if statistics is None else {"mean": statistics, "std": statistics}
    columns = LIBRARY.handle.mvk_patch_row_width(patch)
    assert columns == embed.padded_pixels(images, (patch, patch))
    out = torch.empty(num_rows, columns, dtype=dtype)
    LIBRARY.run("patch_rows", image_dtype=image_dtype, dtype=dtype, image_size=size,
                patch_size=patch, images=images, index=c_index, out=out, **fields)  # fmt: skip
    expect(capability, [
        embed.patch_rows_launch(images, statistics, statistics, index, (patch, patch), out)
    ])  # fmt: skip


def test_embed_visible_patches(drawn):
    capability, draw = drawn
    size, patch, width = draw.choice([(224, 16, 768), (224, 14, 1280), (448, 16, 1280)])
    dtype = draw.choice(HALVES)
    while True:
        index, num_rows, c_index = _index(draw, 2, (size // patch) ** 2, every=True)
        if index.indices is None or index.sequence_ids is not None:
            break
    images, statistics = torch.empty(2, 3, size, size, dtype=torch.uint8), torch.empty(3)
    weight = torch.empty(width, LIBRARY.handle.mvk_patch_row_width(patch), dtype=dtype)
    bias, position = torch.empty(width, dtype=dtype), torch.empty((size // patch) ** 2, width)
    out = torch.empty(num_rows, width, dtype=dtype)
    LIBRARY.run("embed_visible_patches", dtype=dtype, width=width, image_size=size,
                patch_size=patch, images=images, mean=statistics, std=statistics, weight=weight,
                bias=bias, position=position, index=c_index, out=out)  # fmt: skip
    expect(capability, [
        embed.fused_patch_embed_launch(images, statistics, statistics, weight, bias, position,
                                       index, (patch, patch), out, capability)
    ])  # fmt: skip


def test_add_position_and_its_backward(drawn):
    capability, draw = drawn
    dtype, width, tokens = draw.choice(FLOATS), draw.choice(ENCODER_WIDTHS), draw.randint(1, 300)
    bias_dtype = draw.choice([dtype, torch.float32])
    index, num_rows, c_index = _index(draw, 3, tokens, every=True)
    x, out = (torch.empty(num_rows, width, dtype=dtype) for _ in range(2))
    bias, position = torch.empty(width, dtype=bias_dtype), torch.empty(tokens, width)
    chunks = draw.randint(1, 70)
    partial = torch.empty(chunks, width)
    LIBRARY.run("add_position", dtype=dtype, bias_dtype=bias_dtype, width=width, x=x,
                stride_row=width, bias=bias, position=position, index=c_index, out=out)  # fmt: skip
    LIBRARY.run("add_position_backward", dtype=dtype, width=width, grad=x, stride_row=width,
                index=c_index, grad_x=out, chunks=chunks, partial=partial)  # fmt: skip
    expect(capability, [
        embed.add_position_launch(x, bias, position, index, tokens, out),
        embed.add_position_backward_launch(x, index, tokens, out, partial),
    ])  # fmt: skip


def test_predictor_tokens(drawn):
    capability, draw = drawn
    dtype, width = draw.choice(FLOATS), draw.choice([192, 384])
    mask_dtype = draw.choice(FLOATS if dtype == torch.float32 else [dtype, torch.float32])
    num_rows, num_context, num_targets, copies, chunks = (
        draw.randint(1, 900), draw.randint(1, 300), draw.randint(1, 300), draw.choice([1, 4]),
        draw.randint(1, 20),
    )  # fmt: skip
    context, out = (torch.empty(n, width, dtype=dtype) for n in (num_context, num_rows))
    mask_token, position = torch.empty(width, dtype=mask_dtype), torch.empty(196, width)
    context_ids, target_ids, sources = _ids(num_context), _ids(num_targets), _ids(num_rows)
    context_copies, partial = _ids(num_context, copies), torch.empty(chunks, width)
    LIBRARY.run("assemble_predictor_tokens", dtype=dtype, mask_dtype=mask_dtype, width=width,
                num_rows=num_rows, num_context=num_context, num_targets=num_targets,
                num_positions=196, context=context, stride_context=width, mask_token=mask_token,
                position=position, context_ids=context_ids, target_ids=target_ids,
                source_rows=sources, out=out)  # fmt: skip
    LIBRARY.run("assemble_predictor_tokens_backward", dtype=dtype, width=width, copies=copies,
                num_context=num_context, num_targets=num_targets, grad=out, stride_row=width,
                context_copies=context_copies, target_rows=target_ids, grad_context=context,
                chunks=chunks, partial=partial)  # fmt: skip
    expect(capability, [
        predictor_tokens.assemble_launch(context, mask_token, position, context_ids, target_ids,
                                         sources, out),
        predictor_tokens.assemble_backward_launch(out, context_copies, target_ids, context,
                                                  partial),
    ])  # fmt: skip


def test_prediction_loss_and_its_backward(drawn):
    capability, draw = drawn
    dtype, width = draw.choice(FLOATS), draw.choice(ENCODER_WIDTHS)
    feature_dtype, kind = draw.choice([dtype, torch.float32]), draw.choice([0, 1])
    num_rows = draw.choice([1, 2, 31, 32, 33, 1000, 2048, 2049, 5000])
    predictions = torch.empty(num_rows, width, dtype=dtype)
    features, target_rows = torch.empty(77, width, dtype=feature_dtype), _ids(num_rows)
    denominator = draw.choice([None, torch.tensor(3.0), torch.tensor(3)])
    programs = prediction_loss_kernels.loss_programs(num_rows)
    assert LIBRARY.handle.mvk_loss_programs(num_rows) == programs
    partial, out, grad_loss = torch.empty(2, programs), torch.empty(2), torch.ones(())
    mean, rstd, grad = torch.empty(num_rows), torch.empty(num_rows), torch.empty_like(predictions)
    fields = {
        "dtype": dtype, "feature_dtype": feature_dtype, "kind": kind, "width": width,
        "num_rows": num_rows, "num_features": 77, "predictions": predictions,
        "stride_prediction": width, "features": features, "stride_feature": width,
        "target_rows": target_rows, "mean": mean, "rstd": rstd, "out": out,
    }  # fmt: skip
    extra = {} if denominator is None else {
        "denominator": denominator, "denominator_dtype": denominator.dtype
    }  # fmt: skip
    LIBRARY.run("prediction_loss", partial=partial, **fields, **extra)
    LIBRARY.run("prediction_loss_backward", grad_loss=grad_loss, grad=grad, **fields)
    name = prediction_loss.KINDS[kind]
    expect(capability, [
        prediction_loss_kernels.loss_forward_launch(
            predictions, features, target_rows, mean, rstd, partial, name
        ),
        prediction_loss_kernels.loss_finish_launch(partial, denominator, width, out),
        prediction_loss_kernels.loss_backward_launch(
            grad_loss, out, predictions, features, target_rows, mean, rstd, grad, name
        ),
    ])  # fmt: skip


def test_ema_update(drawn):
    capability, draw = drawn
    source_dtype, num_tiles = draw.choice(FLOATS), draw.randint(1, 70)
    tiles, table = _ids(num_tiles, 2, dtype=torch.int32), _ids(8, 4)
    momentum = draw.choice([torch.tensor(0.99), 0.996, 1.0, 0.0])
    field = "momentum_ptr" if isinstance(momentum, Tensor) else "momentum"
    LIBRARY.run("ema_update", source_dtype=source_dtype, tiles=tiles, num_tiles=num_tiles,
                table=table, **{field: momentum})  # fmt: skip
    expect(capability, [ema.ema_launch(tiles, table, momentum, source_dtype)])


def test_adamw_ema(drawn):
    capability, draw = drawn
    dtype = draw.choice(FLOATS)
    gradient_dtype = draw.choice([dtype, torch.float32])
    slots, first, count = draw.randint(1, 40), draw.randint(0, 30), draw.randint(1, 30)
    tiles, table = _ids(first + count, 2, dtype=torch.int32), _ids(slots, 8)
    gradients, partials = _ids(slots), torch.empty(first + count)
    hyper, groups = torch.empty(12, dtype=torch.float64), _ids(slots, dtype=torch.int32)
    steps, coefficients, scalars = torch.empty(slots), torch.empty(slots, 8), torch.empty(4)
    status = torch.zeros(()), torch.zeros((), dtype=torch.bool), torch.tensor(0)
    loss = draw.choice([None, torch.zeros(3)[1]])
    bucket = adamw_ema_launch.Bucket(first, count, dtype, gradient_dtype, dtype)
    shared = {
        "tiles": tiles, "first_tile": first, "num_tiles": count, "table": table,
        "gradients": gradients, "gradient_dtype": gradient_dtype,
    }  # fmt: skip
    LIBRARY.run("adamw_ema_gradient_norm", partials=partials, **shared)
    LIBRARY.run("adamw_ema_decide", partials=partials, num_partials=len(partials), hyper=hyper,
                groups=groups, gradients=gradients, steps=steps, num_slots=slots,
                coefficients=coefficients, scalars=scalars, grad_norm=status[0],
                skipped=status[1], skip_count=status[2],
                **({} if loss is None else {"loss": loss}))  # fmt: skip
    LIBRARY.run("adamw_ema_update", dtype=dtype, coefficients=coefficients, scalars=scalars,
                **shared)  # fmt: skip
    expect(capability, [
        adamw_ema_launch.gradient_norm_launch(tiles, table, gradients, partials, bucket),
        adamw_ema_launch.decide_launch(partials, loss, hyper, groups, gradients, steps,
                                       coefficients, scalars, status),
        adamw_ema_launch.update_launch(tiles, table, gradients, coefficients, scalars, bucket),
    ])  # fmt: skip


def test_pack_lengths_and_tensor_tiles():
    draw = random.Random(5)
    for _ in range(20):
        lengths = [draw.choice([0, 1, 63, 64, 65, 197]) for _ in range(draw.randint(0, 9))]
        packing = pack_lengths(lengths, capacity=sum(lengths) + draw.randint(0, 200))
        names = ("cu_seqlens", "sequence_ids", "sequence_order", "tile_map", "wide_tile_map")
        ours = {name: torch.full_like(getattr(packing, name), 99) for name in names}
        status = LIBRARY.call(
            "pack_lengths", stream=None, lengths=torch.tensor([*lengths, 0]),
            num_sequences=len(lengths), capacity=packing.capacity, **ours,
        )  # fmt: skip
        assert status == 0
        for name in names:
            assert torch.equal(ours[name], getattr(packing, name)), name

        from masked_vit_kernels.optimizer.multi_tensor import tile_map

        sizes = [draw.choice([0, 1, 8191, 8192, 8193, 40000]) for _ in range(draw.randint(1, 9))]
        expected, host = tile_map(sizes), torch.tensor(sizes)
        count = LIBRARY.handle.mvk_tensor_tiles(host.data_ptr(), len(sizes), None)
        tiles = torch.empty(count, 2, dtype=torch.int32)
        LIBRARY.handle.mvk_tensor_tiles(host.data_ptr(), len(sizes), tiles.data_ptr())
        assert torch.equal(tiles, expected)
