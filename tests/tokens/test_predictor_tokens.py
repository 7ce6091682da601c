"""assemble_predictor_tokens: kernels in the interpreter and on a GPU, dispatch, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_vit_kernels import assemble_predictor_tokens, reference
from masked_vit_kernels.packing import pack_predictor
from masked_vit_kernels.tokens import cpu, predictor_tokens
from op_checks import (
    assert_accurate,
    assert_repeatable_and_capturable,
    double,
    gradients,
    leaf,
    packed_ids,
    poison_tail,
    poisoned,
)

NAMES = ("context", "mask_token", "pos_embed")


def predictor_case(context_lengths, target_lengths, num_tokens, width, dtype, device="cpu"):
    """Float inputs (leaves), id tensors and the predictor's packing, with padded tails of NaN."""
    context_ids = packed_ids(context_lengths, num_tokens, padding=4)
    target_ids = packed_ids(target_lengths, num_tokens, padding=2)
    blocks = len(target_lengths) // len(context_lengths)
    total = blocks * sum(context_lengths) + sum(target_lengths)
    packing = pack_predictor(context_ids.packing, target_ids.packing, capacity=total + 5)
    context = poison_tail(torch.randn(len(context_ids.ids), width), context_ids.total)
    floats = [context, torch.randn(1, 1, width), torch.randn(1, num_tokens, width)]
    floats = [x.to(dtype).to(device).requires_grad_() for x in floats]
    return floats, (context_ids.ids.to(device), target_ids.ids.to(device)), packing.to(device)


def check_assemble(
    context_lengths, target_lengths, num_tokens, width, dtype, device="cpu", index_dtype=torch.int64
):
    floats, ids, packing = predictor_case(
        context_lengths, target_lengths, num_tokens, width, dtype, device
    )
    out = assemble_predictor_tokens(*floats, *(x.to(index_dtype) for x in ids), packing)
    assert out.dtype == dtype
    on_cpu, packing_cpu = [x.cpu() for x in ids], packing.to("cpu")
    oracle, plain = [double(x) for x in floats], [leaf(x) for x in floats]
    exact = reference.assemble_predictor_tokens(*oracle, *on_cpu, packing_cpu)
    eager = cpu.assemble_predictor_tokens(*plain, *on_cpu, packing_cpu)
    assert_accurate("tokens", out, exact, eager)

    upstream = poison_tail(torch.randn(out.shape, dtype=dtype), int(packing_cpu.cu_seqlens[-1]))
    found = gradients(out, floats, upstream.to(device))
    expected, rough = gradients(exact, oracle, upstream), gradients(eager, plain, upstream)
    for name, *values in zip(NAMES, found, expected, rough, strict=True):
        assert_accurate(f"gradient of {name}", *values)


# ----------------------------------------------------------------------------- interpreter


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [24, 96])
def test_in_interpreter(width, dtype):
    index_dtype = torch.int32 if dtype == torch.float16 else torch.int64
    # Over 64 targets: the mask token's gradient takes several partial sums.
    targets = [20, 1, 3, 0, 30, 2, 0, 0, 5, 14, 1, 1]
    check_assemble([3, 0, 6], targets, 30, width, dtype, index_dtype=index_dtype)


@pytest.mark.interpreter
@settings(max_examples=10, deadline=None)
@given(data=st.data(), images=st.integers(1, 3), blocks=st.integers(1, 4))
def test_random_packings(data, images, blocks):
    lengths = st.integers(0, 6)
    context = data.draw(st.lists(lengths, min_size=images, max_size=images))
    targets = data.draw(st.lists(lengths, min_size=images * blocks, max_size=images * blocks))
    check_assemble(context, targets, 6, 16, torch.float32)


@pytest.mark.interpreter
def test_outputs_are_written_and_nothing_else():
    (context, mask_token, position), ids, packing = predictor_case(
        [3, 0, 6], [2, 1, 3, 0, 4, 2], 9, 40, torch.float32
    )
    out = poisoned(packing.capacity, 40)
    predictor_tokens.assemble_launch(
        context.detach(), mask_token.detach().view(-1), position.detach()[0], *ids,
        packing.source_rows, out.tensor,
    ).run()  # fmt: skip
    out.check()

    total = int(packing.cu_seqlens[-1])
    grad = poison_tail(torch.randn(packing.capacity, 40), total)
    grad_context, partial = poisoned(context.shape[0], 40), poisoned(3, 40)
    predictor_tokens.assemble_backward_launch(
        grad, packing.context_copies, packing.target_rows, grad_context.tensor, partial.tensor
    ).run()
    grad_context.check()
    partial.check()


@pytest.mark.interpreter
def test_batch_without_a_token():
    floats, ids, packing = predictor_case([0, 0], [0] * 4, 9, 24, torch.float32)
    out = assemble_predictor_tokens(*floats, *ids, packing)
    assert not out.any()
    for grad in gradients(out, floats, torch.full_like(out, float("nan"))):
        assert not grad.any()


@pytest.mark.interpreter
def test_context_views_and_frozen_positions():
    floats, ids, packing = predictor_case([3, 2], [2, 1, 3, 0], 9, 40, torch.float32)
    wide = torch.randn(floats[0].shape[0], 80, requires_grad=True)
    frozen = floats[2].detach()
    out = assemble_predictor_tokens(wide[:, 40:], floats[1], frozen, *ids, packing)
    wide64 = double(wide)
    exact = reference.assemble_predictor_tokens(
        wide64[:, 40:], double(floats[1]), double(frozen), *ids, packing
    )
    assert_accurate("tokens", out, exact)
    upstream = torch.randn(out.shape)
    assert_accurate(
        "gradient", *gradients(out, [wide], upstream), *gradients(exact, [wide64], upstream)
    )


@pytest.mark.interpreter
def test_opcheck_and_one_graph():
    floats, ids, packing = predictor_case([3, 2], [2, 1, 3, 0], 9, 24, torch.float32)
    context, mask_token, position = floats
    arguments = (
        context.detach().nan_to_num().requires_grad_(), mask_token.detach().view(-1),
        position.detach()[0], *ids,
        packing.source_rows, packing.context_copies, packing.target_rows,
    )  # fmt: skip
    torch.library.opcheck(predictor_tokens.assemble_predictor_rows, arguments)

    compiled = torch.compile(assemble_predictor_tokens, backend="aot_eager", fullgraph=True)
    found, expected = (f(*floats, *ids, packing) for f in (compiled, assemble_predictor_tokens))
    assert torch.equal(found, expected)
    upstream = torch.randn_like(found)
    for a, b in zip(*(gradients(x, floats, upstream) for x in (found, expected)), strict=True):
        assert torch.equal(a, b)


# ----------------------------------------------------------------------------- any machine


def test_meta_tensors_give_shapes_and_gradients():
    floats, ids, packing = predictor_case([3, 2], [2, 1, 3, 0], 9, 24, torch.bfloat16)
    floats = [x.detach().to("meta").requires_grad_() for x in floats]
    out = assemble_predictor_tokens(*floats, *(x.to("meta") for x in ids), packing.to("meta"))
    assert (out.shape, out.dtype) == ((packing.capacity, 24), torch.bfloat16)
    out.sum().backward()
    assert all(x.grad.shape == x.shape and x.grad.dtype == x.dtype for x in floats)


def test_wrong_arguments_are_named():
    (context, mask_token, position), ids, packing = predictor_case(
        [3, 2], [2, 1, 3, 0], 9, 24, torch.float32
    )
    with pytest.raises(ValueError, match=r"context must have shape \(Tc, P\)"):
        assemble_predictor_tokens(context[1:], mask_token, position, *ids, packing)
    with pytest.raises(ValueError, match="mask_token must have 24 elements"):
        assemble_predictor_tokens(context, mask_token[..., 1:], position, *ids, packing)
    with pytest.raises(ValueError, match=r"pos_embed must have shape \(N, 24\)"):
        assemble_predictor_tokens(context, mask_token, position[..., 1:], *ids, packing)
    with pytest.raises(ValueError, match="target_ids must have shape"):
        assemble_predictor_tokens(context, mask_token, position, ids[0], ids[1][1:], packing)
    with pytest.raises(ValueError, match="context_ids must be int32 or int64"):
        assemble_predictor_tokens(context, mask_token, position, ids[0].float(), ids[1], packing)
    with pytest.raises(IndexError, match="target_ids holds 9"):
        assemble_predictor_tokens(
            context, mask_token, position, ids[0], torch.full_like(ids[1], 9), packing
        )


# ----------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [24, 192, 384, 1024])
def test_on_gpu(width, dtype):
    check_assemble([70, 0, 111, 153], [44, 30, 0, 60] * 4, 256, width, dtype, "cuda")


@pytest.mark.gpu
def test_backward_is_bitwise_repeatable_and_capturable():
    floats, ids, packing = predictor_case([90] * 16, [33] * 64, 196, 384, torch.bfloat16, "cuda")
    upstream = torch.randn(packing.capacity, 384, device="cuda", dtype=torch.bfloat16)

    def run():
        return gradients(assemble_predictor_tokens(*floats, *ids, packing), floats, upstream)

    assert_repeatable_and_capturable(run)
