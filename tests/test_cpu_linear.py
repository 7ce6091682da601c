"""Linear layers on the CPU: oneDNN's products against float64, whatever this processor prefers."""

import pytest
import torch
import torch.nn.functional as F
from masked_vit_kernels import cpu_linear, linear
from op_checks import gradients

SHAPES = [  # T, K, N
    (1, 1, 1),
    (7, 5, 3),
    (33, 24, 96),  # weight gradient computed transposed
    (64, 96, 24),
    (19, 300, 1000),  # too large for that
]


@pytest.fixture
def onednn(monkeypatch):
    """oneDNN for both dtypes; on processors that prefer another library too."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch was built without oneDNN")
    both = frozenset({torch.float32, torch.bfloat16})
    monkeypatch.setattr(cpu_linear, "ONEDNN_DTYPES", both)


def make_inputs(shape, dtype, bias):
    tokens, width, out_width = shape
    made = [torch.randn(tokens, width), torch.randn(out_width, width)]
    made += [torch.randn(out_width)] if bias else []
    return [x.to(dtype).requires_grad_() for x in made]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients(onednn, shape, dtype, bias):
    inputs = make_inputs(shape, dtype, bias)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    upstream = torch.randn(shape[0], shape[2]).to(dtype)
    found, exact = linear(*inputs), F.linear(*exact_inputs)
    eager = F.linear(*inputs)
    assert found.dtype == dtype
    pairs = zip(
        [found, *gradients(found, inputs, upstream)],
        [eager, *gradients(eager, inputs, upstream)],
        [exact, *gradients(exact, exact_inputs, upstream.double())],
        strict=True,
    )
    floor = {torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]
    for name, (ours, theirs, truth) in zip(("out", "x", "weight", "bias"), pairs, strict=False):
        error, allowed = ((y.double() - truth).abs().max().item() for y in (ours, theirs))
        assert error <= 2 * allowed + floor * truth.abs().max().item(), name


def test_strided_inputs_are_read_as_they_are(onednn):
    wide = torch.randn(30, 40)
    x, weight = wide[::2, 3:11], torch.randn(8, 20).t()[:, :8]
    assert not x.is_contiguous() and not weight.is_contiguous()
    torch.testing.assert_close(linear(x, weight), F.linear(x.double(), weight.double()).float())
    upstream = torch.randn(20, 15).t()
    leaf = x.detach().requires_grad_()
    (grad,) = gradients(linear(leaf, weight), [leaf], upstream)
    torch.testing.assert_close(grad, (upstream.double() @ weight.double()).float())


def test_no_tokens(onednn):
    x, weight, bias = make_inputs((0, 4, 6), torch.float32, bias=True)
    out = linear(x, weight, bias)
    assert out.shape == (0, 6)
    grads = gradients(out, [x, weight, bias], torch.empty(0, 6))
    assert [float(grad.abs().sum()) for grad in grads] == [0, 0, 0]


def test_autocast_computes_in_its_dtype_and_returns_float32_gradients(onednn):
    x, weight, bias = make_inputs((16, 8, 4), torch.float32, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(x, weight, bias)
    assert out.dtype == torch.bfloat16
    grads = gradients(out, [x, weight, bias], torch.ones_like(out))
    assert {grad.dtype for grad in grads} == {torch.float32}
    torch.testing.assert_close(grads[2], torch.full((4,), 16.0))


def test_frozen_weights_get_no_gradient(onednn):
    x, weight, bias = make_inputs((16, 8, 4), torch.float32, bias=True)
    weight.requires_grad_(False)
    linear(x, weight, bias).sum().backward()
    assert weight.grad is None and x.grad is not None and bias.grad is not None


def test_compiles_as_one_graph(onednn):
    inputs = make_inputs((24, 16, 32), torch.float32, bias=True)
    upstream = torch.randn(24, 32)
    compiled = torch.compile(lambda *a: F.gelu(linear(*a)), fullgraph=True, backend="aot_eager")
    expected = gradients(F.gelu(linear(*inputs)), inputs, upstream)
    for found, exact in zip(gradients(compiled(*inputs), inputs, upstream), expected, strict=True):
        torch.testing.assert_close(found, exact)


def test_float64_and_other_shapes_go_to_pytorch(onednn):
    x, weight = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    x, weight = torch.randn(2, 3, 4), torch.randn(5, 4)
    assert linear(x, weight).shape == (2, 3, 5)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(3, 7), weight)


def test_a_width_of_none_is_the_bias_and_another_bias_is_refused(onednn):
    x, bias = torch.zeros(3, 0), torch.randn(5)
    assert torch.equal(linear(x, torch.zeros(5, 0), bias), bias.expand(3, 5))
    with pytest.raises(RuntimeError, match=r"size of the tensor \(5\) must match"):
        linear(torch.zeros(3, 4), torch.zeros(5, 4), bias[:2])


def test_the_choice_is_the_processors(monkeypatch):
    choose = cpu_linear._onednn_dtypes
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(cpu_linear, "_vendor", lambda: "GenuineIntel")
    assert choose() == frozenset()
    monkeypatch.setattr(cpu_linear, "_vendor", lambda: "AuthenticAMD")
    assert choose() == {torch.float32}
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    assert choose() == frozenset()
