"""latent_prediction_loss against targets normalised over an image's patches, or not at all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_vit_kernels import latent_prediction_loss, reference
from masked_vit_kernels.tokens import cpu
from masked_vit_kernels.tokens.image_statistics import image_statistics, image_statistics_launch
from masked_vit_kernels.tokens.prediction_loss import KINDS, TARGET_NORMS, prediction_loss
from op_checks import (
    assert_accurate,
    assert_repeatable_and_capturable,
    double,
    gradients,
    leaf,
    poisoned,
)

OTHERS = ("instance", "none")


def norm_case(images, patches, width, dtype, device="cpu", padding=3):
    """Every image has its own mean and deviation; rows in any order, duplicates, padding."""
    features = torch.randn(images, patches, width) * (1 + torch.rand(images, 1, width) * 3)
    features += 2 * torch.randn(images, 1, width)
    rows = torch.randint(max(1, images * patches), (2 * images + padding,))
    rows[2 * images :] = -1
    if images > 1:
        rows[1] = -1  # padding between valid rows too
    predictions = torch.randn(rows.shape[0], width) * 1.5
    predictions[rows < 0] = float("nan")
    return (
        predictions.to(dtype).to(device).requires_grad_(),
        features.to(dtype).to(device),
        rows.to(device),
    )


def check_norm(
    images, patches, width, dtype, norm, kind="smooth_l1", device="cpu", denominator=None
):
    predictions, features, rows = norm_case(images, patches, width, dtype, device)
    count = None if denominator is None else torch.tensor(denominator, device=device)
    out = latent_prediction_loss(
        predictions, features, rows, kind=kind, target_norm=norm, denominator=count
    )
    assert (out.dtype, out.shape) == (torch.float32, ())
    oracle, plain = double(predictions), leaf(predictions)
    options = {
        "kind": kind, "target_norm": norm, "denominator": None if count is None else count.cpu()
    }  # fmt: skip
    exact = reference.latent_prediction_loss(oracle, double(features), rows.cpu(), **options)
    eager = cpu.latent_prediction_loss(plain, features.cpu(), rows.cpu(), **options)
    assert_accurate("loss", out, exact, eager)

    upstream = torch.tensor(3.4 * max(1, images) * width)  # gradients near 1
    (grad,) = gradients(out, [predictions], upstream.to(device))
    assert grad.dtype == dtype
    (exact_grad,) = gradients(exact, [oracle], upstream)
    (eager_grad,) = gradients(eager, [plain], upstream)
    assert_accurate("gradient", grad, exact_grad, eager_grad)


def by_hand(predictions, features, rows, norm, kind):
    """The formulas of the module's docstring, element by element, in float64."""
    total, count = 0.0, 0
    for prediction, row in zip(predictions.double(), rows.tolist(), strict=True):
        if row < 0:
            continue
        image = features[row // features.shape[1]].double()
        target = image[row % features.shape[1]]
        if norm == "instance":
            mean = image.sum(0) / image.shape[0]
            target = (target - mean) / ((image - mean).pow(2).sum(0) / image.shape[0] + 1e-5).sqrt()
        d = prediction - target
        if kind == "cosine":
            distances = 1 - prediction @ target / (prediction.norm() * target.norm())
        else:
            smooth = torch.where(d.abs() < 1, d * d / 2, d.abs() - 0.5)
            distances = {"smooth_l1": smooth, "l2": d * d, "l1": d.abs()}[kind]
        total += distances.sum()
        count += distances.numel()
    return total / count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", OTHERS)
def test_reference_and_cpu_follow_the_formulas(norm, kind):
    predictions, features, rows = norm_case(3, 7, 10, torch.float64)
    expected = by_hand(predictions.detach(), features, rows, norm, kind)
    for op in (reference.latent_prediction_loss, cpu.latent_prediction_loss):
        found = op(predictions, features, rows, kind=kind, target_norm=norm)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("norm", OTHERS)
def test_cpu_path_with_gradients(norm):
    check_norm(4, 9, 48, torch.float32, norm)
    check_norm(4, 9, 48, torch.float32, norm, kind="l2", denominator=17.0)


# ----------------------------------------------------------------------------- interpreter


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("norm", OTHERS)
def test_in_interpreter(norm, dtype, kind):
    check_norm(3, 5, 24, dtype, norm, kind)
    check_norm(2, 70, 200, dtype, norm, kind, denominator=123.0)


@pytest.mark.interpreter
@settings(max_examples=12, deadline=None)
@given(
    images=st.integers(0, 3),
    patches=st.sampled_from([1, 2, 33, 65]),
    width=st.sampled_from([1, 8, 33, 65]),
    norm=st.sampled_from(OTHERS),
)
def test_random_shapes(images, patches, width, norm):
    check_norm(images, patches, width, torch.float32, norm)


@pytest.mark.interpreter
@pytest.mark.parametrize(("patches", "width"), [(1, 7), (16, 64), (37, 96), (131, 65)])
def test_statistics_are_written_whole_and_nothing_else(patches, width):
    features = torch.randn(3, patches, width) * 4 + 100  # a mean far from zero
    out = poisoned(2, 3, width)
    image_statistics_launch(features, out.tensor).run()
    mean, rstd = out.check()
    exact = features.double()
    assert_accurate("mean", mean, exact.mean(1))
    assert_accurate("rstd", rstd, (exact.var(1, unbiased=False) + 1e-5).rsqrt())


@pytest.mark.interpreter
def test_strided_features():
    features = torch.randn(2, 5, 80, requires_grad=True)[..., ::2]
    predictions = torch.randn(4, 40, requires_grad=True)
    rows = torch.tensor([0, 9, 3, -1], dtype=torch.int32)
    out = latent_prediction_loss(predictions, features, rows, target_norm="instance")
    exact = reference.latent_prediction_loss(
        double(predictions), features.detach().double(), rows.long(), target_norm="instance"
    )
    assert_accurate("loss", out, exact)


@pytest.mark.interpreter
def test_nan_in_an_image_reaches_its_rows_alone():
    predictions, features = torch.randn(2, 16, requires_grad=True), torch.randn(2, 3, 16)
    features[1, 2, 5] = float("nan")
    loss = latent_prediction_loss(
        predictions, features, torch.tensor([0, 3]), target_norm="instance"
    )
    (grad,) = gradients(loss, [predictions], torch.ones(()))
    assert loss.isnan()
    assert grad[1, 5].isnan() and grad.isnan().sum() == 1


@pytest.mark.interpreter
@pytest.mark.parametrize("norm", OTHERS)
def test_opcheck_and_one_graph(norm):
    predictions, features, rows = norm_case(3, 5, 24, torch.float32)
    predictions = predictions.detach().nan_to_num().requires_grad_()
    torch.library.opcheck(image_statistics, (features,))
    statistics = image_statistics(features) if norm == "instance" else None
    torch.library.opcheck(
        prediction_loss,
        (predictions, features.flatten(0, 1), rows, None, "smooth_l1", norm, statistics),
    )

    def scaled(predictions):
        return 3 * latent_prediction_loss(predictions * 2, features, rows, target_norm=norm)

    found = torch.compile(scaled, backend="aot_eager", fullgraph=True)(predictions)
    expected, one = scaled(predictions), torch.ones(())
    assert torch.equal(found, expected)
    assert torch.equal(
        *gradients(found, [predictions], one), *gradients(expected, [predictions], one)
    )


# ----------------------------------------------------------------------------- any machine


@pytest.mark.parametrize("norm", OTHERS)
def test_meta_tensors_give_shapes_and_gradients(norm):
    predictions = torch.empty(7, 24, device="meta", dtype=torch.bfloat16, requires_grad=True)
    features = torch.empty(2, 5, 24, device="meta", dtype=torch.bfloat16)
    rows = torch.empty(7, device="meta", dtype=torch.int64)
    loss = latent_prediction_loss(predictions, features, rows, target_norm=norm)
    loss.backward()
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert (predictions.grad.shape, predictions.grad.dtype) == ((7, 24), torch.bfloat16)


def test_instance_norm_wants_every_patch():
    predictions, features, rows = norm_case(3, 5, 24, torch.float32)
    with pytest.raises(ValueError, match=r"every patch .* \(B, N, 24\), got \(15, 24\)"):
        latent_prediction_loss(predictions, features.flatten(0, 1), rows, target_norm="instance")
    with pytest.raises(ValueError, match=r"target_norm must be one of .*, got 'batch'"):
        latent_prediction_loss(predictions, features, rows, target_norm="batch")


# ----------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("norm", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [24, 192, 768, 1280, 1408])
def test_on_gpu(width, dtype, norm):
    check_norm(40, 196, width, dtype, norm, device="cuda")
    check_norm(5, 256, width, dtype, norm, kind="l2", device="cuda", denominator=1e4)
    check_norm(0, 9, width, dtype, norm, device="cuda")


@pytest.mark.gpu
def test_bitwise_repeatable_and_capturable():
    predictions, features, rows = norm_case(64, 256, 1280, torch.bfloat16, "cuda")

    def run():
        loss = latent_prediction_loss(predictions, features, rows, target_norm="instance")
        return loss.detach().clone(), *gradients(loss, [predictions], torch.ones((), device="cuda"))

    assert_repeatable_and_capturable(run)


def test_every_norm_is_tested():
    assert set(TARGET_NORMS) == {"layer", *OTHERS}
