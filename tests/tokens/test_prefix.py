"""prepend_tokens and split_prefix: on the CPU, in the interpreter and on a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_vit_kernels import pack_lengths, pack_prefix, prepend_tokens, reference, split_prefix
from masked_vit_kernels.tokens import prefix as ops
from op_checks import (
    assert_accurate,
    double,
    gradients,
    leaf,
    lengths_strategy,
    poison_tail,
)


def check_prefix(lengths, count, dtype, device, *, padding=3, width=40, shape="shared"):
    """Both ops and their gradients; padding of every input and gradient holds NaN."""
    packed = pack_lengths(lengths, capacity=sum(lengths) + padding)
    extended = pack_prefix(packed, count)
    here, total = extended.to(device), int(extended.cu_seqlens[-1])
    first = {"shared": (count,), "one": (1, count), "each": (len(lengths), count)}[shape]
    x = poison_tail(torch.randn(packed.capacity, width, dtype=dtype), sum(lengths))
    prefix = torch.randn(*first, width, dtype=dtype)
    x, prefix = (tensor.to(device).requires_grad_() for tensor in (x, prefix))

    out = prepend_tokens(x, prefix, here)
    leaves = [double(x), double(prefix)]
    exact = reference.prepend_tokens(leaves[0], leaves[1], extended)
    assert torch.equal(out.double().cpu(), exact)
    upstream = poison_tail(torch.randn(out.shape, dtype=dtype), total)
    found = gradients(out, [x, prefix], upstream.to(device))
    expected = gradients(exact, leaves, upstream)
    plain = [leaf(x), leaf(prefix)]
    rough = gradients(reference.prepend_tokens(plain[0], plain[1], extended), plain, upstream)
    for name, *values in zip(("x", "prefix"), found, expected, rough, strict=True):
        assert_accurate(f"gradient of {name}", *values)

    whole = poison_tail(torch.randn(out.shape, dtype=dtype), total).to(device).requires_grad_()
    exact_whole = double(whole)
    ours, theirs = split_prefix(whole, here), reference.split_prefix(exact_whole, extended)
    for found_part, exact_part in zip(ours, theirs, strict=True):
        assert torch.equal(found_part.double().cpu(), exact_part)
    weights = torch.randn_like(theirs[0]), torch.randn_like(theirs[1])
    poison_tail(weights[1], sum(lengths))
    kept = slice(None, sum(lengths))
    loss = (ours[0].cpu() * weights[0].to(dtype)).sum()
    loss = loss + (ours[1].cpu()[kept] * weights[1].to(dtype)[kept]).sum()
    exact_loss = (theirs[0] * weights[0].to(dtype)).sum()
    exact_loss = exact_loss + (theirs[1][kept] * weights[1].to(dtype)[kept]).sum()
    (grad,), (exact_grad,) = (
        torch.autograd.grad(loss, [whole]), torch.autograd.grad(exact_loss, [exact_whole])
    )  # fmt: skip
    assert torch.equal(grad.double().cpu(), exact_grad)


CASES = [
    ((3, 0, 70, 2), 1, "shared"),
    ((5, 1), 4, "one"),
    ((0, 0), 2, "each"),
    ((7, 3, 2), 3, "each"),
]


@pytest.mark.parametrize(("lengths", "count", "shape"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_cpu(lengths, count, shape, dtype):
    check_prefix(lengths, count, dtype, "cpu", shape=shape)


@settings(max_examples=20, deadline=None)
@given(lengths=lengths_strategy(7), count=st.integers(0, 4), padding=st.integers(0, 4))
def test_random_packings(lengths, count, padding):
    check_prefix(lengths, count, torch.float32, "cpu", padding=padding)


@pytest.mark.interpreter
@pytest.mark.parametrize(("lengths", "count", "shape"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_in_interpreter(lengths, count, shape, dtype):
    check_prefix(lengths, count, dtype, "cpu", shape=shape)


@pytest.mark.interpreter
def test_opcheck():
    extended = pack_prefix(pack_lengths([3, 0, 2], capacity=7), 2)
    maps = (extended.source_rows, extended.prefix_rows, extended.token_rows)
    x, prefix = (torch.randn(rows, 24, requires_grad=True) for rows in (7, 6))
    torch.library.opcheck(ops.prepend_rows, (x, prefix, *maps))
    whole = torch.randn(extended.capacity, 24, requires_grad=True)
    torch.library.opcheck(ops.split_rows, (whole, *maps))


def test_one_graph():
    extended = pack_prefix(pack_lengths([3, 0, 2], capacity=7), 2)

    def round_trip(x, prefix):
        return split_prefix(2 * prepend_tokens(x, prefix, extended), extended)

    x, prefix = torch.randn(7, 8), torch.randn(2, 8)
    compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(x, prefix), round_trip(x, prefix), strict=True):
        assert torch.equal(found, expected)


def test_the_sequences_are_a_packing_that_attention_takes():
    extended = pack_prefix(pack_lengths([3, 0, 2], max_seqlen=5, capacity=7), 2)
    assert extended.cu_seqlens.tolist() == [0, 5, 7, 11]
    assert (extended.max_seqlen, extended.capacity, extended.num_prefix_tokens) == (7, 13, 2)
    assert extended.prefix_rows.tolist() == [0, 1, 5, 6, 7, 8]
    assert extended.token_rows.tolist() == [2, 3, 4, 9, 10, -1, -1]


def test_what_does_not_fit_is_refused():
    packed = pack_lengths([3, 0, 2], capacity=7)
    with pytest.raises(ValueError, match="num_prefix_tokens must not be negative, got -1"):
        pack_prefix(packed, -1)
    extended = pack_prefix(packed, 2)
    with pytest.raises(ValueError, match=r"prefix must have shape \(2, 8\), \(1, 2, 8\) or \(3, 2"):
        prepend_tokens(torch.randn(7, 8), torch.randn(2, 2, 8), extended)
    with pytest.raises(ValueError, match=r"x must have shape \(7, D\)"):
        prepend_tokens(torch.randn(8, 8), torch.randn(2, 8), extended)
    with pytest.raises(ValueError, match=r"x must have shape \(13, D\), the capacity"):
        split_prefix(torch.randn(8, 8), extended)


@pytest.mark.gpu
@pytest.mark.parametrize(("lengths", "count", "shape"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_gpu(lengths, count, shape, dtype):
    check_prefix(lengths, count, dtype, "cuda", shape=shape, width=384)
