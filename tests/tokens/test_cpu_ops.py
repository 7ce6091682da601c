"""The CPU path against the reference in float64, and under torch.compile as one graph.

Attention's CPU path has `attention/test_cpu_attention.py`.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_vit_kernels import (
    assemble_predictor_tokens,
    embed_visible_patches,
    gather_tokens,
    latent_prediction_loss,
    pack_lengths,
    pack_predictor,
    reference,
    scatter_tokens,
)
from masked_vit_kernels.tokens import cpu
from op_checks import assert_accurate, gradients, lengths_strategy, packed_ids, poison_tail

NUM_TOKENS, WIDTH = 6, 5
EXAMPLES = settings(max_examples=40, deadline=None)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def agree(name, found, expected, inputs, upstream):
    """Outputs and all gradients of the CPU path and the reference, both in float64."""
    assert_accurate(name, found.detach(), expected.detach())
    pairs = zip(
        gradients(found, inputs, upstream), gradients(expected, inputs, upstream), strict=True
    )
    for number, (grad, exact) in enumerate(pairs):
        assert_accurate(f"{name}, gradient of input {number}", grad, exact)


packings = {
    "lengths": lengths_strategy(NUM_TOKENS),
    "padding": st.integers(0, 3),
    "unique": st.booleans(),
}


@EXAMPLES
@given(**packings)
def test_gather_packed(lengths, padding, unique):
    packed = packed_ids(lengths, NUM_TOKENS, padding=padding, unique=unique)
    x, arguments = randn(len(lengths), NUM_TOKENS, WIDTH), (packed.ids, packed.packing)
    found, expected = cpu.gather_tokens(x, *arguments), reference.gather_tokens(x, *arguments)
    upstream = poison_tail(torch.randn(found.shape), packed.total)
    agree("gather", found, expected, [x], upstream)


@EXAMPLES
@given(batch=st.integers(1, 3), kept=st.integers(0, 8), blocks=st.integers(1, 3))
def test_gather_dense_blocks_and_flat(batch, kept, blocks):
    x, ids = randn(batch, NUM_TOKENS, WIDTH), torch.randint(-1, NUM_TOKENS, (batch, kept))
    found, expected = cpu.gather_tokens(x, ids), reference.gather_tokens(x, ids)
    agree("dense", found, expected, [x], torch.randn(found.shape))

    flat = randn(NUM_TOKENS, WIDTH)
    found, expected = cpu.gather_tokens(flat, ids[0]), reference.gather_tokens(flat, ids[0])
    agree("flat", found, expected, [flat], torch.randn(found.shape))

    packed = packed_ids([kept % 5] * batch * blocks, NUM_TOKENS)
    arguments = (x, packed.ids, packed.packing)
    found, expected = cpu.gather_tokens(*arguments), reference.gather_tokens(*arguments)
    agree("blocks", found, expected, [x], torch.randn(found.shape))


@EXAMPLES
@given(lengths=packings["lengths"], padding=packings["padding"], fill_ndim=st.integers(1, 3))
def test_scatter(lengths, padding, fill_ndim):
    packed = packed_ids(lengths, NUM_TOKENS, padding=padding)
    rows = poison_tail(torch.randn(len(packed.ids), WIDTH).double(), packed.total)
    rows.requires_grad_()
    fill = randn(*(len(lengths), NUM_TOKENS, WIDTH)[3 - fill_ndim :])
    arguments = (rows, packed.ids, fill, NUM_TOKENS, packed.packing)
    found, expected = cpu.scatter_tokens(*arguments), reference.scatter_tokens(*arguments)
    agree("scatter", found, expected, [rows, fill], torch.randn(found.shape))
    # What was put is found again, and nothing else is.
    again = cpu.gather_tokens(found, packed.ids, packed.packing)
    assert torch.equal(again[: packed.total], rows[: packed.total])


@EXAMPLES
@given(
    **packings,
    channels=st.integers(1, 4),
    layout=st.sampled_from(["packed", "dense", "all"]),
    has_bias=st.booleans(),
    has_position=st.booleans(),
    normalize=st.booleans(),
)
def test_embed(lengths, padding, unique, channels, layout, has_bias, has_position, normalize):
    packed = packed_ids(lengths, NUM_TOKENS, padding=padding, unique=unique)
    arguments = {
        "packed": (packed.ids, packed.packing),
        "dense": (torch.randint(-1, NUM_TOKENS, (len(lengths), 4)), None),
        "all": (None, None),
    }[layout]
    images = randn(len(lengths), channels, 4, 9)  # 2 x 3 patches of 2 x 3 pixels
    inputs = [images, randn(WIDTH, channels, 2, 3)]
    bias, position = randn(WIDTH), randn(1, NUM_TOKENS, WIDTH)
    optional = [bias if has_bias else None, position if has_position else None]
    inputs += [x for x in optional if x is not None]
    statistics = {"mean": [0.4] * channels, "std": torch.rand(channels) + 0.5} if normalize else {}
    found, expected = (
        op(images, inputs[1], *optional, *arguments, **statistics)
        for op in (cpu.embed_visible_patches, reference.embed_visible_patches)
    )
    upstream = torch.randn(found.shape)
    if layout == "packed":
        poison_tail(upstream, packed.total)
    agree("embed", found, expected, inputs, upstream)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
def test_embed_takes_no_other_integers_than_uint8(dtype):
    """They were once taken for normalised pixels: 255 times as large."""
    with pytest.raises(ValueError, match=f"images must be one of uint8, .*, got {dtype}"):
        embed_visible_patches(
            torch.zeros(1, 3, 8, 8, dtype=dtype), torch.zeros(16, 3, 4, 4), None, None
        )
    with pytest.raises(ValueError, match=r"bias must have shape \(16,\), got \(3,\)"):
        embed_visible_patches(
            torch.zeros(1, 3, 8, 8), torch.zeros(16, 3, 4, 4), torch.zeros(3), None
        )


def test_embed_reads_uint8_as_fractions():
    images = torch.randint(0, 256, (2, 3, 4, 9), dtype=torch.uint8)
    weight = torch.randn(WIDTH, 3, 2, 3)
    found = cpu.embed_visible_patches(images, weight, None, None, mean=[0.5] * 3, std=[0.2] * 3)
    by_hand = torch.nn.functional.conv2d((images / 255.0 - 0.5) / 0.2, weight, stride=(2, 3))
    assert_accurate("tokens", found, by_hand.flatten(2).transpose(1, 2).double())


@EXAMPLES
@given(data=st.data(), images=st.integers(1, 3), blocks=st.integers(1, 4))
def test_assemble(data, images, blocks):
    lengths = st.integers(0, NUM_TOKENS)
    context, targets = (
        packed_ids(data.draw(st.lists(lengths, min_size=n, max_size=n)), NUM_TOKENS)
        for n in (images, images * blocks)
    )
    packing = pack_predictor(context.packing, targets.packing)
    rows = poison_tail(torch.randn(len(context.ids), WIDTH).double(), context.total)
    inputs = [rows.requires_grad_(), randn(1, 1, WIDTH), randn(1, NUM_TOKENS, WIDTH)]
    arguments = (*inputs, context.ids, targets.ids, packing)
    found = cpu.assemble_predictor_tokens(*arguments)
    expected = (
        reference.assemble_predictor_tokens(*arguments)
        if packing.capacity
        else found.detach().clone()
    )
    agree("assemble", found, expected, inputs, torch.randn(found.shape))


@EXAMPLES
@given(
    num_rows=st.integers(0, 9),
    kind=st.sampled_from(["smooth_l1", "l2"]),
    denominator=st.sampled_from([None, 3.0, 11]),
)
def test_loss(num_rows, kind, denominator):
    rows = torch.randint(-1, 4, (num_rows,))
    predictions = torch.randn(num_rows, WIDTH).double() * 2
    predictions[rows < 0] = float("nan")
    predictions.requires_grad_()
    features = torch.randn(2, 2, WIDTH).double()
    options = {
        "kind": kind,
        "denominator": None if denominator is None else torch.tensor(denominator),
    }
    arguments = (predictions, features, rows)
    found = cpu.latent_prediction_loss(*arguments, **options)
    expected = reference.latent_prediction_loss(*arguments, **options)
    agree("loss", found, expected, [predictions], torch.tensor(1.3))


def test_loss_by_hand():
    """Two rows by hand: LayerNorm of (0, 2) is (-1, 1) but for eps."""
    predictions = torch.tensor([[-1.0, 3.0], [0.5, 1.0]])
    features = torch.tensor([[0.0, 2.0]])
    loss = latent_prediction_loss(predictions, features, torch.tensor([0, 0]))
    assert loss.item() == pytest.approx((0 + 1.5 + 1.0 + 0) / 4, abs=1e-4)
    loss = latent_prediction_loss(predictions, features, torch.tensor([0, 0]), kind="l2")
    assert loss.item() == pytest.approx((0 + 4 + 2.25 + 0) / 4, abs=1e-4)


def test_the_four_ops_compile_into_one_graph():
    """Pixels to loss under torch.compile(fullgraph=True), as a model chains the ops."""
    context, targets = packed_ids([3, 0, 5], 6), packed_ids([2, 1, 0, 3, 4, 1], 6)
    packing = pack_predictor(context.packing, targets.packing)
    images = torch.randint(0, 256, (3, 3, 8, 12), dtype=torch.uint8)
    target_rows = torch.where(
        targets.ids >= 0, targets.packing.sequence_ids.long() // 2 * 6 + targets.ids, -1
    )
    features = torch.randn(3, 6, 16)
    parameters = [
        torch.randn(*shape, requires_grad=True)
        for shape in ((16, 3, 4, 4), (16,), (6, 16), (1, 1, 16))
    ]

    def step(weight, bias, position, mask_token):
        tokens = embed_visible_patches(
            images, weight, bias, position, context.ids, context.packing, mean=[0.5] * 3
        )
        dense = scatter_tokens(tokens, context.ids, bias, 6, context.packing)
        tokens = gather_tokens(dense.tanh(), context.ids, context.packing)
        rows = assemble_predictor_tokens(
            tokens, mask_token, position, context.ids, targets.ids, packing
        )
        predictions = gather_tokens(rows, packing.target_rows, packing)
        return latent_prediction_loss(predictions, features, target_rows)

    compiled = torch.compile(step, fullgraph=True)
    found, expected = compiled(*parameters), step(*parameters)
    torch.testing.assert_close(found, expected)
    one = torch.ones(())
    pairs = zip(
        gradients(found, parameters, one), gradients(expected, parameters, one), strict=True
    )
    for grad, exact in pairs:
        torch.testing.assert_close(grad, exact)


def test_packings_of_one_sequence_and_of_none():
    x = torch.randn(1, 6, 4)
    empty = pack_lengths([0])
    assert gather_tokens(x, torch.empty(0, dtype=torch.long), empty).shape == (0, 4)
    assert scatter_tokens(
        torch.empty(0, 4), torch.empty(0, dtype=torch.long), torch.ones(4), 6, empty
    ).equal(torch.ones(1, 6, 4))
