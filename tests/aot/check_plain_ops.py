"""The plain C ops that GPU results are compared with are themselves right: float64 reference."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_double, c_int, c_int64, c_void_p

import torch
from aot_build import BUILD
from masked_vit_kernels import pack_lengths, pack_predictor, reference

C = ctypes.CDLL(str(BUILD / "tests/libplain_ops.so"))
C.plain_loss.restype = c_double


def _p(x: torch.Tensor | None) -> c_void_p:
    assert x is None or x.is_contiguous()
    return c_void_p(None if x is None else x.data_ptr())


class _Index(ctypes.Structure):
    _fields_ = (
        ("indices", c_void_p), ("sequence_ids", c_void_p), ("rows", c_int), ("tokens", c_int),
        ("rows_per_image", c_int), ("sequences_per_image", c_int),
    )  # fmt: skip


def _close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


def setup_function():
    torch.manual_seed(0)


def test_attention():
    packing_q = pack_lengths([5, 0, 70, 3], capacity=80)
    packing_k = pack_lengths([9, 4, 33, 0], capacity=50)
    q, k, v = (torch.randn(n, 2, 24) for n in (80, 50, 50))
    dout = torch.randn_like(q)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    expected, lse = reference.varlen_attention(
        *wide, packing_q.cu_seqlens, packing_k.cu_seqlens, softmax_scale=0.3
    )
    gradients = torch.autograd.grad(expected, wide, dout.double())
    out, found_lse = torch.empty_like(q), torch.empty(2, 80)
    maps = _p(packing_q.cu_seqlens), _p(packing_k.cu_seqlens)
    inputs = _p(q), _p(k), _p(v)
    C.plain_attention_forward(
        4, 2, 24, 80, c_double(0.3), *maps, *inputs, _p(out), _p(found_lse)
    )
    _close(out, expected.detach())
    _close(found_lse, lse.detach())
    found = [torch.empty_like(x) for x in (q, k, v)]
    C.plain_attention_backward(
        4, 2, 24, 80, 50, c_double(0.3), *maps, *inputs, _p(dout), *map(_p, found)
    )
    for ours, theirs in zip(found, gradients, strict=True):
        _close(ours, theirs)


def _packed_index():
    packing = pack_lengths([3, 2, 4, 1], capacity=12)  # two images of two sequences
    ids = torch.tensor([0, 3, 5, 1, 2, 6, 0, 5, 3, 4, -1, -1])
    return packing, ids, _Index(ids.data_ptr(), packing.sequence_ids.data_ptr(), 12, 7, 1, 2)


def test_gather_scatter_and_sums():
    packing, ids, index = _packed_index()
    x, out = torch.randn(2, 7, 16), torch.empty(12, 16)
    C.plain_gather(byref(index), 16, _p(x), _p(out))
    _close(out, reference.gather_tokens(x, ids, packing))

    dense = torch.tensor([[1, 4, -1], [0, 6, 2]])
    index = _Index(dense.data_ptr(), None, 6, 7, 3, 1)
    rows, fill, found = torch.randn(2, 3, 16), torch.randn(16), torch.empty(2, 7, 16)
    expanded = fill.expand(2, 7, 16).contiguous()
    C.plain_scatter(byref(index), 2, 16, _p(rows), _p(expanded), _p(found))
    _close(found, reference.scatter_tokens(rows, dense, fill, 7))
    grad, total = torch.randn(2, 7, 16), torch.empty(16)
    leaf = fill.clone().requires_grad_()
    reference.scatter_tokens(rows, dense, leaf, 7).backward(grad)
    C.plain_scatter_fill_gradient(byref(index), 2, 16, _p(grad), _p(total))
    _close(total, leaf.grad)

    order, starts = torch.tensor([4, 0, 2, 1]), torch.tensor([0, 1, 1, 4])
    values, sums = torch.randn(5, 16), torch.empty(3, 16)
    C.plain_sum_rows_by_place(3, 16, _p(order), _p(starts), _p(values), _p(sums))
    _close(sums, torch.stack([values[4], torch.zeros(16), values[[0, 2, 1]].sum(0)]))


def test_embedding():
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    weight, bias, position = torch.randn(8, 3, 16, 16) / 30, torch.randn(8), torch.randn(4, 8)
    ids = torch.tensor([[0, 3, -1], [2, 1, 0]])
    index = _Index(ids.data_ptr(), None, 6, 4, 3, 1)
    patches, product, out = torch.empty(6, 768), torch.empty(6, 8), torch.empty(6, 8)
    C.plain_patch_rows(byref(index), 32, 16, 768, _p(images), _p(mean), _p(std), _p(patches))
    C.plain_linear(6, 768, 8, _p(patches), _p(weight.flatten(1)), _p(product))
    C.plain_add_position(byref(index), 8, _p(product), _p(bias), _p(position), _p(out))
    expected = reference.embed_visible_patches(
        images, weight.double(), bias.double(), position, ids, mean=mean, std=std
    )
    _close(out.view(2, 3, 8), expected)
    grad, grad_x, total = torch.randn(6, 8), torch.empty(6, 8), torch.empty(8)
    C.plain_add_position_backward(byref(index), 8, _p(grad), _p(grad_x), _p(total))
    _close(grad_x, grad * (ids.view(-1, 1) >= 0))
    _close(total, grad_x.sum(0))


def test_predictor_tokens():
    context, target = pack_lengths([4, 3], capacity=8), pack_lengths([2, 1, 3, 2], capacity=9)
    packing = pack_predictor(context, target)
    x = torch.randn(8, 16, requires_grad=True)
    mask = torch.randn(16, requires_grad=True)
    position = torch.randn(6, 16)
    context_ids, target_ids = torch.randint(0, 6, (8,)), torch.randint(0, 6, (9,))
    expected = reference.assemble_predictor_tokens(
        x, mask, position, context_ids, target_ids, packing
    )
    rows, out = packing.capacity, torch.empty(packing.capacity, 16)
    C.plain_assemble(
        rows, 8, 9, 16, _p(x.detach()), _p(mask.detach()), _p(position), _p(context_ids),
        _p(target_ids), _p(packing.source_rows), _p(out),
    )  # fmt: skip
    _close(out, expected.detach())
    grad = torch.randn(rows, 16)
    expected.backward(grad)
    grad_x, grad_mask = torch.empty(8, 16), torch.empty(16)
    C.plain_assemble_backward(
        8, 9, packing.context_copies.shape[1], 16, _p(grad), _p(packing.context_copies),
        _p(packing.target_rows), _p(grad_x), _p(grad_mask),
    )  # fmt: skip
    _close(grad_x, x.grad)
    _close(grad_mask, mask.grad)


def test_loss():
    features, target_rows = torch.randn(7, 16), torch.tensor([3, 0, -1, 6, 3])
    for l2, kind in enumerate(("smooth_l1", "l2")):
        for denominator in (None, torch.tensor(11.0)):
            predictions = (2 * torch.randn(5, 16)).requires_grad_()
            expected = reference.latent_prediction_loss(
                predictions, features, target_rows, kind=kind, denominator=denominator
            )
            expected.backward()
            grad = torch.empty(5, 16)
            found = C.plain_loss(
                l2, 5, 16, _p(predictions.detach()), _p(features), _p(target_rows),
                c_double(float(denominator or 0)), _p(grad),
            )  # fmt: skip
            _close(torch.tensor(found).float(), expected.detach())
            _close(grad, predictions.grad)


class _AdamW(ctypes.Structure):
    _fields_ = (
        *((n, c_double) for n in ("lr", "beta1", "beta2", "eps", "decay", "momentum", "clip")),
        ("step", c_int),
    )


def test_ema_and_adamw():
    target, source = torch.randn(100), torch.randn(100)
    expected = target.clone()
    reference.ema_update_([expected], [source], 0.9)
    C.plain_ema(c_int64(100), c_double(0.9), _p(target), _p(source))
    _close(target, expected)

    p, m, v, average = torch.randn(100), torch.randn(100), torch.rand(100), torch.randn(100)
    gradient = torch.randn(100)
    wide = [x.double().clone() for x in (p, m, v, average)]
    norm, _ = reference.adamw_ema_step(
        [wide[0]], [gradient.double()], [(wide[1], wide[2])], [wide[3]], [4], lr=0.01,
        weight_decay=0.1, momentum=0.9, max_grad_norm=1.0,
    )  # fmt: skip
    with_ = _AdamW(0.01, 0.9, 0.999, 1e-8, 0.1, 0.9, min(1.0, 1.0 / (norm + 1e-6)), 5)
    C.plain_adamw_ema(
        byref(with_), c_int64(100), _p(gradient), _p(p), _p(m), _p(v), _p(average)
    )
    for ours, theirs in zip((p, m, v, average), wide, strict=True):
        _close(ours, theirs)
