"""The adapters against the code that they stand in for, written out in PyTorch; flash-attn's own
varlen cases against float64."""

import pytest
import torch
import torch.nn.functional as F
from masked_vit_kernels import pack_lengths, reference, varlen_attention
from masked_vit_kernels.adapters import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    memory_efficient_attention,
    restore_tokens,
)
from op_checks import assert_accurate, double, gradients, leaf

# Lengths of queries and keys of flash-attn's varlen tests, in one batch, and one without keys.
FLASH_LENGTHS = ((1, 147), (113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (64, 0))


def dense(q, k, v, lengths_q, lengths_k):
    """Sequence by sequence in the inputs' own dtype, keys repeated for heads that share them."""
    group, outputs = q.shape[1] // k.shape[1], []
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    parts = (q.split(lengths_q), k.split(lengths_k), v.split(lengths_k))
    for one_q, one_k, one_v in zip(*parts, strict=True):
        scores = torch.einsum("qhd,khd->hqk", one_q, one_k) * q.shape[2] ** -0.5
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), one_v))
    return torch.cat(outputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("head_dim", "key_heads"), [(32, 6), (40, 2), (64, 6), (64, 1), (80, 2), (96, 6), (128, 1)]
)
def test_flash_attn_varlen_cases_against_float64(head_dim, key_heads, dtype):
    lengths_q, lengths_k = (list(side) for side in zip(*FLASH_LENGTHS, strict=True))
    packings = [pack_lengths(lengths) for lengths in (lengths_q, lengths_k)]
    q = torch.randn(sum(lengths_q), 6, head_dim, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(sum(lengths_k), key_heads, head_dim, dtype=dtype, requires_grad=True)
            for _ in range(2))  # fmt: skip
    bounds = [packing.cu_seqlens for packing in packings]
    longest = [packing.max_seqlen for packing in packings]
    out, lse, probabilities = flash_attn_varlen_func(
        q, k, v, *bounds, *longest, 0.0, None, False, return_attn_probs=True, deterministic=True
    )
    assert probabilities is None
    exact_inputs, eager_inputs = [double(x) for x in (q, k, v)], [leaf(x) for x in (q, k, v)]
    exact, exact_lse = reference.varlen_attention(*exact_inputs, *bounds)
    eager = dense(*eager_inputs, lengths_q, lengths_k)
    assert_accurate("out", out, exact, eager)
    assert torch.allclose(lse.double(), exact_lse, atol=2e-3)
    upstream = torch.randn(out.shape, dtype=dtype)
    found = gradients(out, [q, k, v], upstream)
    expected = gradients(exact, exact_inputs, upstream)
    rough = gradients(eager, eager_inputs, upstream)
    for name, *values in zip("qkv", found, expected, rough, strict=True):
        assert_accurate(f"gradient of {name}", *values)


def test_the_packed_variants_are_the_plain_one():
    packing = pack_lengths([3, 0, 7])
    qkv = torch.randn(10, 3, 4, 16)
    side = (packing.cu_seqlens, packing.max_seqlen)
    plain = flash_attn_varlen_func(
        *qkv.unbind(1), packing.cu_seqlens, packing.cu_seqlens, 7, 7, softmax_scale=0.3
    )
    packed = flash_attn_varlen_qkvpacked_func(qkv, *side, softmax_scale=0.3)
    kv = flash_attn_varlen_kvpacked_func(
        qkv[:, 0], qkv[:, 1:], packing.cu_seqlens, packing.cu_seqlens, 7, 7, softmax_scale=0.3
    )
    assert torch.equal(plain, packed) and torch.equal(plain, kv)


@pytest.mark.parametrize(
    ("keyword", "value", "why"),
    [
        ("causal", True, "sees all of its keys"),
        ("dropout_p", 0.1, "no dropout"),
        ("window_size", (8, 8), "no local windows"),
        ("softcap", 30.0, "not capped"),
        ("alibi_slopes", torch.ones(2), "no bias"),
        ("block_table", torch.zeros(1, 1), "not paged"),
    ],
)
def test_other_attention_is_refused_in_words(keyword, value, why):
    x, bounds = torch.randn(4, 2, 8), torch.tensor([0, 4], dtype=torch.int32)
    for attention in (flash_attn_varlen_func, varlen_attention):
        with pytest.raises(ValueError, match=f"{keyword} must be .*{why}"):
            attention(x, x, x, bounds, bounds, 4, 4, **{keyword: value})


def test_neutral_keywords_change_nothing_and_unknown_ones_are_refused():
    x, bounds = torch.randn(4, 2, 8), torch.tensor([0, 4], dtype=torch.int32)
    plain = varlen_attention(x, x, x, bounds, bounds, 4, 4)
    neutral = varlen_attention(
        x, x, x, bounds, bounds, 4, 4, causal=False, dropout_p=0.0, window_size=(-1, -1),
        softcap=0.0, alibi_slopes=None, deterministic=False, block_table=None,
    )  # fmt: skip
    assert torch.equal(plain, neutral)
    with pytest.raises(TypeError, match="unexpected keyword argument 'casual'"):
        varlen_attention(x, x, x, bounds, bounds, 4, 4, casual=False)


def test_heads_that_cannot_be_shared_are_refused():
    bounds = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"a multiple of them, got 4 and 3"):
        varlen_attention(
            torch.randn(4, 4, 8), *torch.randn(2, 4, 3, 8), bounds, bounds, 4, 4
        )


def test_block_diagonal_attention_is_sdpa_under_the_mask():
    lengths, key_lengths = [5, 2, 9], [4, 6, 3]
    q, k, v = torch.randn(1, 16, 3, 24), torch.randn(1, 13, 3, 24), torch.randn(1, 13, 3, 24)
    mask = torch.block_diag(*(torch.ones(a, b) for a, b in zip(lengths, key_lengths, strict=True)))
    by_heads = [x.transpose(1, 2) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*by_heads, attn_mask=mask.bool()).transpose(1, 2)
    found = memory_efficient_attention(q, k, v, lengths, key_lengths)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    packings = pack_lengths(lengths), pack_lengths(key_lengths)
    described = memory_efficient_attention(q, k, v, *packings)
    assert torch.equal(described, found)
    with pytest.raises(ValueError, match="must add up to the 16 tokens, got 15"):
        memory_efficient_attention(q, k, v, [5, 10], key_lengths)
    with pytest.raises(ValueError, match="dropout_p must be 0"):
        memory_efficient_attention(q, k, v, lengths, key_lengths, p=0.5)


def test_tokens_are_restored_as_in_mae():
    batch, tokens, kept, width = 3, 11, 4, 8
    shuffle = torch.rand(batch, tokens).argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    x = torch.randn(batch, kept, width, requires_grad=True)
    mask = torch.randn(1, 1, width, requires_grad=True)
    stock = torch.cat([x, mask.expand(batch, tokens - kept, width)], dim=1)
    stock = stock.gather(1, restore[..., None].expand(-1, -1, width))
    found = restore_tokens(x, restore, mask)
    assert torch.equal(found, stock)
    upstream = torch.randn_like(found)
    for ours, theirs in zip(
        gradients(found, [x, mask], upstream), gradients(stock, [x, mask], upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="12 kept tokens do not fit the 11"):
        restore_tokens(torch.randn(3, 12, 8), restore, mask)
