"""The bucketed CPU attention against the float64 reference: outputs, log-sum-exp, gradients."""

import numpy as np
import pytest
import torch
from masked_vit_kernels import (
    pack_lengths,
    reference,
    varlen_attention,
    varlen_attention_kvpacked,
    varlen_attention_qkvpacked,
)
from masked_vit_kernels.attention import cpu as cpu_attention
from masked_vit_kernels.catalogue.sizes import HEAD_DIMS

# Error allowed against float64, in units of the largest value: a few roundings of each dtype.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2}
LENGTHS = [0, 1, 15, 63, 64, 65, 5, 5, 6, 31, 0, 2]
KEY_LENGTHS = [7, 1, 0, 64, 20, 65, 5, 9, 3, 33, 0, 1]


def cu(lengths):
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])).to(torch.int32)


def padded(rows, heads, head_dim, dtype, padding=5, poison=float("nan")):
    """Random (rows + padding, heads, head_dim) whose padding holds NaN."""
    x = torch.randn(rows + padding, heads, head_dim, dtype=torch.float64).to(dtype)
    x[rows:] = poison
    return x


def oracle(q, k, v, grad, cu_q, cu_k, **settings):
    """Float64 outputs and gradients; padding is cleaned first, as nobody may read it."""
    q, k, v = (x.detach().double().nan_to_num().requires_grad_() for x in (q, k, v))
    out, lse = reference.varlen_attention(q, k, v, cu_q, cu_k, **settings)
    out.backward(grad.double().nan_to_num())
    return out.detach(), lse.detach(), q.grad, k.grad, v.grad


def assert_close(actual, expected, dtype):
    actual = actual.double()
    assert actual.shape == expected.shape
    infinite = expected.isinf()
    assert torch.equal(actual[infinite], expected[infinite])
    error = (actual - expected)[~infinite].abs().max().item() if (~infinite).any() else 0.0
    bound = TOLERANCES[dtype] * (1.0 + expected[~infinite].abs().max().item())
    assert error <= bound, f"error {error:.2e} over {bound:.2e}"


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("head_dim", [8, *HEAD_DIMS])
def test_separate_tensors_match_float64(dtype, head_dim):
    cu_q, cu_k = cu(LENGTHS), cu(KEY_LENGTHS)
    q = padded(sum(LENGTHS), 3, head_dim, dtype).requires_grad_()
    k, v = (padded(sum(KEY_LENGTHS), 3, head_dim, dtype).requires_grad_() for _ in "kv")
    grad = padded(sum(LENGTHS), 3, head_dim, dtype)
    out, lse = varlen_attention(q, k, v, cu_q, cu_k, 65, 65, return_lse=True)
    out.backward(grad)
    expected = oracle(q, k, v, grad, cu_q, cu_k)
    assert_close(lse, expected[1], torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    for actual, wanted in zip((q.grad, k.grad, v.grad), expected[2:], strict=True):
        assert_close(actual, wanted, dtype)
    assert_close(out.detach(), expected[0], dtype)
    assert lse.dtype == torch.float32 and not lse.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_variants_return_one_buffer(dtype):
    cu_q, cu_k = cu(LENGTHS), cu(KEY_LENGTHS)
    qkv = torch.stack([padded(sum(LENGTHS), 2, 24, dtype) for _ in range(3)], 1).requires_grad_()
    grad = padded(sum(LENGTHS), 2, 24, dtype)
    out = varlen_attention_qkvpacked(qkv, cu_q, 65, softmax_scale=0.3)
    out.backward(grad)
    wanted = oracle(*qkv.unbind(1), grad, cu_q, cu_q, softmax_scale=0.3)
    assert_close(out.detach(), wanted[0], dtype)
    assert_close(qkv.grad, torch.stack(wanted[2:], 1), dtype)

    q = qkv.detach()[:, 1].requires_grad_()  # strided
    kv = torch.stack([padded(sum(KEY_LENGTHS), 2, 24, dtype) for _ in range(2)], 1).requires_grad_()
    out = varlen_attention_kvpacked(q, kv, cu_q, cu_k, 65, 65)
    out.backward(grad)
    wanted = oracle(q, *kv.unbind(1), grad, cu_q, cu_k)
    assert_close(out.detach(), wanted[0], dtype)
    assert_close(q.grad, wanted[2], dtype)
    assert_close(kv.grad, torch.stack(wanted[3:], 1), dtype)


def test_packed_gradient_is_one_buffer_and_views_are_read_in_place():
    qkv = torch.randn(40, 3, 2, 16)
    _, stride = cpu_attention._head_rows(qkv[:, 1])
    assert stride == 6
    transposed = torch.randn(2, 40, 16).transpose(0, 1)
    rows, stride = cpu_attention._head_rows(transposed)  # heads apart: copied
    assert stride == 2 and torch.equal(rows.view(40, 2, 16), transposed)


def test_random_lengths_in_float64():
    """Fresh lengths each run, many buckets; the seed is in the message on failure."""
    seed = int(np.random.SeedSequence().entropy % 2**32)
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    lengths = rng.integers(0, 90, 40)
    qkv = torch.randn(int(lengths.sum()), 3, 2, 8, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(int(lengths.sum()), 2, 8, dtype=torch.float64)
    out = varlen_attention_qkvpacked(qkv, cu(lengths), 90)
    out.backward(grad)
    wanted = oracle(*qkv.unbind(1), grad, cu(lengths), cu(lengths))
    try:
        assert_close(out.detach(), wanted[0], torch.float64)
        assert_close(qkv.grad, torch.stack(wanted[2:], 1), torch.float64)
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from error


def test_nothing_but_padding():
    qkv = torch.full((4, 3, 2, 8), float("nan"), requires_grad=True)
    out, lse = varlen_attention_qkvpacked(qkv, cu([0, 0]), 4, return_lse=True)
    out.sum().backward()
    assert not out.any() and not qkv.grad.any() and bool((lse == -torch.inf).all())


@pytest.mark.parametrize("product_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_gradients_with_either_kind_of_product(product_dtype, monkeypatch):
    """CPUs with bfloat16 products take another path than those without."""
    monkeypatch.setattr(cpu_attention, "_matmul_dtype", lambda dtype: product_dtype)
    bounds = cu([33, 0, 30, 64])
    qkv = torch.stack([padded(127, 2, 32, torch.bfloat16) for _ in range(3)], 1).requires_grad_()
    grad = padded(127, 2, 32, torch.bfloat16)
    varlen_attention_qkvpacked(qkv, bounds, 64).backward(grad)
    wanted = oracle(*qkv.unbind(1), grad, bounds, bounds)
    assert_close(qkv.grad, torch.stack(wanted[2:], 1), torch.bfloat16)


@pytest.mark.parametrize("bounds", [[1, 4], [0, 5, 3], [0, 22]], ids=str)
def test_bad_bounds_are_named(bounds):
    qkv, bounds = torch.randn(21, 3, 2, 8), torch.tensor(bounds, dtype=torch.int32)
    message = "cu_seqlens must start at 0, not decrease and end within the 21 rows"
    with pytest.raises(ValueError, match=message):
        varlen_attention_qkvpacked(qkv, bounds, 9)


def test_bad_shapes_are_named():
    q, kv, bounds = torch.randn(9, 2, 8), torch.randn(9, 2, 3, 8), cu([9])
    with pytest.raises(ValueError, match="or a multiple of them, got 2 and 3"):
        varlen_attention_kvpacked(q, kv, bounds, bounds, 9, 9)
    with pytest.raises(ValueError, match="as many sequences, got 1 and 2"):
        varlen_attention(q, q, q, bounds, cu([4, 5]), 9, 9)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"softmax_scale": -0.5}, "softmax_scale must be positive and finite, got -0.5"),
        ({"softmax_scale": float("nan")}, "softmax_scale must be positive and finite, got nan"),
        ({"max_seqlen": -1}, "max_seqlen must not be negative, got -1"),
        ({"cu_seqlens": torch.tensor([0.0, 9.0])}, "cu_seqlens_q must be one of int32, int64"),
        ({"cu_seqlens": cu([9])[None]}, r"cu_seqlens_q must have shape \(S \+ 1,\), got \(1, 2\)"),
        ({"qkv": torch.zeros(9, 2, 2, 8)}, r"qkv must have shape \(T, 3, H, D\)"),
        ({"qkv": torch.zeros(9, 3, 2, 8, dtype=torch.int32)}, "inputs must be one of float32"),
        ({"packing": pack_lengths([4, 4])}, "packing describes 8 rows .* got 9 rows"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:30],
)
def test_cpu_arguments_are_checked_as_on_a_gpu(wrong, message):
    """The CPU branch used to return before the checks: a negative scale gave a result."""
    given = {"qkv": torch.randn(9, 3, 2, 8), "cu_seqlens": cu([9]), "max_seqlen": 9}
    with pytest.raises(ValueError, match=message):
        varlen_attention_qkvpacked(**given | wrong)


def test_compiles_without_a_graph_break_and_passes_opcheck():
    bounds = cu([5, 9, 0, 5])
    qkv = torch.randn(21, 3, 2, 8, requires_grad=True)
    torch.library.opcheck(
        torch.ops.masked_vit_kernels.cpu_varlen_attention.default, ([qkv], bounds, bounds, 0.3)
    )
    attend = torch.compile(
        lambda x: varlen_attention_qkvpacked(x, bounds, 9).square().sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    (compiled,) = torch.autograd.grad(attend(qkv), qkv)
    (eager,) = torch.autograd.grad(varlen_attention_qkvpacked(qkv, bounds, 9).square().sum(), qkv)
    assert torch.equal(compiled, eager)


def test_autocast_computes_in_its_dtype():
    bounds = cu([5, 9])
    qkv = torch.randn(14, 3, 2, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = varlen_attention_qkvpacked(qkv, bounds, 9)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and qkv.grad.dtype == torch.float32


def test_padded_queries_get_zero_gradients_where_every_key_row_is_used():
    """Buffers of the two sides are cleared on their own: only one of them has padding here."""
    lengths_q, lengths_k = [3, 2], [4, 6]
    q = torch.randn(5 + 4, 2, 8, requires_grad=True)
    kv = torch.randn(10, 2, 2, 8, requires_grad=True)
    junk = [torch.full_like(q, float("nan")) for _ in range(8)]  # for the allocator to hand out
    del junk
    out = varlen_attention_kvpacked(q, kv, cu(lengths_q), cu(lengths_k), 3, 6)
    out.sum().backward()
    assert torch.equal(q.grad[5:], torch.zeros(4, 2, 8))
    assert (q.grad[:5] != 0).any(-1).all() and kv.grad.isfinite().all()


@pytest.mark.parametrize(
    "lengths",
    [[7, 7, 7], [7, 7, 6], [130] * 40],
    ids=["one length", "two", "more scores than one bucket takes"],
)
def test_sequences_of_one_length_need_no_reordering(lengths):
    """Forward and backward beside the float64 reference, with and without the shortcut."""
    qkv = torch.randn(sum(lengths), 3, 2, 16, requires_grad=True)
    grad, bounds = torch.randn(sum(lengths), 2, 16), cu(lengths)
    assert cpu_attention._plan_for(*qkv.unbind(1)[:2], bounds, bounds).uniform == (6 not in lengths)
    longest = max(lengths)
    out, lse = varlen_attention_qkvpacked(qkv, bounds, longest, return_lse=True)
    out.backward(grad)
    expected = oracle(*qkv.unbind(1), grad, bounds, bounds)
    assert_close(out.detach(), expected[0], torch.float32)
    assert_close(lse, expected[1], torch.float32)
    for actual, wanted in zip(qkv.grad.unbind(1), expected[2:], strict=True):
        assert_close(actual, wanted, torch.float32)
