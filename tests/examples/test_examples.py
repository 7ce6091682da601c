"""The four methods: a step's loss and gradients against stock PyTorch, one graph, a loss curve."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "kernels" / "examples"
METHODS = ("mae", "data2vec", "dinov2", "vjepa")
CLASSES = {"mae": "MAE", "data2vec": "Data2Vec", "dinov2": "DINOv2", "vjepa": "VJEPA"}
BATCH = 3


@pytest.fixture(autouse=True)
def examples_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def loaded(method):
    return importlib.import_module(method), importlib.import_module("stock")


def problem(method, seed=0):
    """A model whose teacher differs from its student, and what its forward takes."""
    example, _ = loaded(method)
    generated = importlib.import_module("generated")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = getattr(example, CLASSES[method])()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for buffer in model.buffers():
            buffer.normal_(std=0.1)
    if method == "vjepa":
        masking = example.draw_masking(BATCH, generator, hidden=(8, 8))
        return model, (generated.clips(BATCH, example.FRAMES, example.SIZE, generator), masking)
    if method == "dinov2":
        crops = example.draw_crops(generated.images(BATCH, 64, generator), generator)
        return model, (*crops, example.draw_masking(BATCH, generator))
    images = generated.images(BATCH, example.SIZE, generator)
    return model, (images, example.draw_masking(BATCH, generator))


def loss_and_gradients(model, forward, inputs):
    """Of a forward that returns a loss, or a loss first."""
    result = forward(*inputs)
    loss = result if isinstance(result, torch.Tensor) else result[0]
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return loss.detach(), dict(zip(named, gradients, strict=True))


def cast(model, inputs, dtype):
    floats = [
        x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs
    ]
    return model.to(dtype), floats


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_those_of_stock_pytorch(method):
    _, stock = loaded(method)
    model, inputs = problem(method)
    loss, gradients = loss_and_gradients(model, model, inputs)
    stock_forward = getattr(stock, method)
    expected_loss, expected = loss_and_gradients(
        model, lambda *given: stock_forward(model, *given), inputs
    )
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    for name, gradient in expected.items():
        if gradient is None:
            assert gradients[name] is None or not gradients[name].any(), name
            continue
        scale = gradient.abs().max().clamp(min=1e-4)
        error = (gradients[name] - gradient).abs().max() / scale
        assert error <= 1e-5, f"gradient of {name}: {error:.2g}"


@pytest.mark.parametrize("method", METHODS)
def test_in_bfloat16_the_error_is_that_of_stock_pytorch(method):
    _, stock = loaded(method)
    stock_forward = getattr(stock, method)
    model, inputs = problem(method)
    model, inputs = cast(model, inputs, torch.bfloat16)  # the weights are those, exactly
    loss, gradients = loss_and_gradients(model, model, inputs)
    rough_loss, rough = loss_and_gradients(model, lambda *x: stock_forward(model, *x), inputs)
    model, inputs = cast(model, inputs, torch.float32)
    exact_loss, exact = loss_and_gradients(model, lambda *x: stock_forward(model, *x), inputs)
    assert (loss - exact_loss).abs() <= 2 * (rough_loss - exact_loss).abs() + 0.01 * exact_loss
    ours, theirs, size = (
        sum((a.float() - (b if b is not None else 0)).square().sum() for a, b in pairs) ** 0.5
        for pairs in (
            [(gradients[n], exact[n]) for n in exact if exact[n] is not None],
            [(rough[n], exact[n]) for n in exact if exact[n] is not None],
            [(exact[n], None) for n in exact if exact[n] is not None],
        )
    )
    assert ours <= 2 * theirs + 0.01 * size, f"error {ours:.3g}, stock {theirs:.3g} of {size:.3g}"


def test_clips_that_hide_different_numbers_are_those_clips_one_by_one():
    example, stock = loaded("vjepa")
    model, (clips, _) = problem("vjepa")
    generator = torch.Generator().manual_seed(1)
    masking = example.draw_masking(BATCH, generator)
    packing = masking.predictor_packing
    assert packing.cu_seqlens.diff().unique().numel() == 1  # context and targets are all tokens
    loss, gradients = loss_and_gradients(model, model, (clips, masking))
    bounds = masking.context_packing.cu_seqlens.tolist()
    assert len(set(masking.context_packing.cu_seqlens.diff().tolist())) > 1
    total, count = 0.0, masking.targets.numel()
    for clip in range(BATCH):
        ids = masking.context[bounds[clip] : bounds[clip + 1]]
        hidden = masking.target_rows[masking.target_rows // example.NUM_TOKENS == clip]
        alone = example.Masking(
            ids, hidden % example.NUM_TOKENS, hidden, masking.context_packing, packing,
            masking.whole,
        )  # fmt: skip
        total = total + stock.vjepa(model, clips[clip : clip + 1], alone) * len(hidden) / count
    torch.testing.assert_close(loss, total.detach(), rtol=1e-5, atol=0)
    named = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(total, named)
    for ours, theirs in zip(gradients.values(), expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_one_graph(method):
    model, inputs = problem(method)
    loss, gradients = loss_and_gradients(model, model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, same = loss_and_gradients(model, compiled, inputs)
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        if gradient is not None:
            torch.testing.assert_close(same[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_script_trains_and_writes_its_curve(method, tmp_path):
    folders = [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / f"{method}.py"), "--steps", "12", "--batch", "8"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "curve.csv")], env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [float(line.split(",")[1]) for line in
              (tmp_path / "curve.csv").read_text().splitlines()[1:]]  # fmt: skip
    assert len(losses) == 12 and all(loss == loss for loss in losses)
    assert "s left" in done.stdout
