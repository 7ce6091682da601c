"""latent_prediction_loss: kernels in the interpreter and on a GPU, dispatch, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_vit_kernels import latent_prediction_loss, reference
from masked_vit_kernels.tokens import cpu, prediction_loss, prediction_loss_kernels
from op_checks import (
    assert_accurate,
    assert_repeatable_and_capturable,
    double,
    gradients,
    leaf,
    poisoned,
)

KINDS = prediction_loss.KINDS


def loss_case(num_rows, num_features, width, dtype, device="cpu", padding=3):
    """Predictions of which some are far and some near, rows with duplicates, NaN on padding."""
    features = torch.randn(num_features, width) * 3 + 1
    rows = torch.randint(num_features, (num_rows + padding,)) if num_features else None
    if rows is None:
        rows = torch.full((num_rows + padding,), -1)
    rows[num_rows:] = -1
    if num_rows > 2:
        rows[1] = -1  # padding between valid rows too
    predictions = torch.randn(num_rows + padding, width) * 1.5
    predictions[rows < 0] = float("nan")
    return (
        predictions.to(dtype).to(device).requires_grad_(),
        features.to(dtype).to(device),
        rows.to(device),
    )


def check_loss(num_rows, num_features, width, dtype, kind, device="cpu", denominator=None):
    predictions, features, rows = loss_case(num_rows, num_features, width, dtype, device)
    count = None if denominator is None else torch.tensor(denominator, device=device)
    out = latent_prediction_loss(predictions, features, rows, kind=kind, denominator=count)
    assert (out.dtype, out.shape) == (torch.float32, ())
    oracle, plain = double(predictions), leaf(predictions)
    options = {"kind": kind, "denominator": None if count is None else count.cpu()}
    exact = reference.latent_prediction_loss(oracle, double(features), rows.cpu(), **options)
    eager = cpu.latent_prediction_loss(plain, features.cpu(), rows.cpu(), **options)
    assert_accurate("loss", out, exact, eager)

    upstream = torch.tensor(
        1.7 * max(1, num_rows) * width
    )  # gradients near 1, as loss scaling does
    (grad,) = gradients(out, [predictions], upstream.to(device))
    assert grad.dtype == dtype
    (exact_grad,) = gradients(exact, [oracle], upstream)
    (eager_grad,) = gradients(eager, [plain], upstream)
    assert_accurate("gradient", grad, exact_grad, eager_grad)


# ----------------------------------------------------------------------------- interpreter


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [24, 192])
def test_in_interpreter(width, dtype, kind):
    check_loss(17, 12, width, dtype, kind)
    check_loss(5, 12, width, dtype, kind, denominator=123.0)


@pytest.mark.interpreter
@settings(max_examples=12, deadline=None)
@given(
    num_rows=st.integers(0, 9),
    width=st.sampled_from([1, 8, 33, 64]),
    kind=st.sampled_from(KINDS),
    denominator=st.sampled_from([None, 7.0, 40]),
)
def test_random_shapes(num_rows, width, kind, denominator):
    check_loss(num_rows, 4, width, torch.float32, kind, denominator=denominator)


@pytest.mark.interpreter
@pytest.mark.parametrize("programs", [1, 2, 5])
def test_more_rows_than_programs(programs, monkeypatch):
    """Each program of the forward takes several rows, the last one fewer."""
    monkeypatch.setattr(prediction_loss_kernels, "MOST_PROGRAMS", programs)
    check_loss(12, 5, 40, torch.float32, "smooth_l1")


@pytest.mark.interpreter
def test_no_valid_row_gives_zero():
    predictions = torch.full((4, 16), float("nan"), requires_grad=True)
    loss = latent_prediction_loss(predictions, torch.randn(3, 16), torch.full((4,), -1))
    (grad,) = gradients(loss, [predictions], torch.tensor(float("inf")))
    assert loss.item() == 0
    assert not grad.any(), "padding stays zero, even where the loss scale overflowed"


@pytest.mark.interpreter
def test_no_row_at_all():
    predictions = torch.empty(0, 16, requires_grad=True)
    loss = latent_prediction_loss(
        predictions, torch.randn(3, 16), torch.empty(0, dtype=torch.int64)
    )
    loss.backward()
    assert loss.item() == 0
    assert predictions.grad.shape == (0, 16)


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_a_valid_row_reaches_loss_and_gradient(kind):
    predictions, features = torch.randn(4, 16), torch.randn(3, 16)
    predictions[2, 5] = float("nan")
    predictions.requires_grad_()
    loss = latent_prediction_loss(predictions, features, torch.tensor([0, 1, 2, -1]), kind=kind)
    (grad,) = gradients(loss, [predictions], torch.ones(()))
    assert loss.isnan()
    assert grad[2, 5].isnan()
    assert grad.isnan().sum() == (16 if kind == "cosine" else 1)  # the row's length is NaN


@pytest.mark.interpreter
def test_outputs_are_written_and_nothing_else():
    predictions, features, rows = loss_case(9, 5, 40, torch.float32)
    predictions = predictions.detach()
    mean, rstd, partial, out = poisoned(12), poisoned(12), poisoned(2, 4), poisoned(2)
    statistics = (mean.tensor, rstd.tensor)
    prediction_loss_kernels.loss_forward_launch(
        predictions, features, rows, *statistics, partial.tensor, "l2"
    ).run()
    prediction_loss_kernels.loss_finish_launch(partial.check(), None, 40, out.tensor).run()
    out.check()
    valid = rows >= 0
    exact = features.double()[rows[valid]]
    assert_accurate("mean", mean.check()[valid], exact.mean(1))
    spread = (exact.var(1, unbiased=False) + reference.TARGET_LAYER_NORM_EPS).rsqrt()
    assert_accurate("rstd", rstd.check()[valid], spread)

    grad = poisoned(12, 40)
    prediction_loss_kernels.loss_backward_launch(
        torch.tensor(1.0), out.tensor, predictions, features, rows, *statistics, grad.tensor, "l2"
    ).run()
    assert not grad.check()[~valid].any()


@pytest.mark.interpreter
def test_strided_inputs_and_unions_of_images():
    wide = torch.randn(6, 80, requires_grad=True)
    features = torch.randn(2, 5, 80)[..., :40]
    rows = torch.tensor([0, 9, 5, 5, 3, -1], dtype=torch.int32)
    out = latent_prediction_loss(wide[:, 40:], features, rows)
    wide64 = double(wide)
    exact = reference.latent_prediction_loss(wide64[:, 40:], features.double(), rows.long())
    assert_accurate("loss", out, exact)
    one = torch.ones(())
    assert_accurate("gradient", *gradients(out, [wide], one), *gradients(exact, [wide64], one))


@pytest.mark.interpreter
def test_opcheck_and_one_graph():
    predictions, features, rows = loss_case(6, 5, 24, torch.float32)
    predictions = predictions.detach().nan_to_num().requires_grad_()
    torch.library.opcheck(
        prediction_loss.prediction_loss,
        (predictions, features, rows, torch.tensor(5.0), "smooth_l1"),
    )

    def scaled(predictions):
        return 3 * latent_prediction_loss(predictions * 2, features, rows, kind="l2")

    found = torch.compile(scaled, backend="aot_eager", fullgraph=True)(predictions)
    expected, one = scaled(predictions), torch.ones(())
    assert torch.equal(found, expected)
    assert torch.equal(
        *gradients(found, [predictions], one), *gradients(expected, [predictions], one)
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("norm", ["layer", "none"])
def test_cosine_of_rows_without_a_length(norm):
    """As in F.cosine_similarity: a length counts as 1e-8 at least, and nothing becomes NaN."""
    predictions = torch.randn(4, 16)
    predictions[1] = 0
    features = torch.randn(3, 16)
    features[2] = 0
    predictions.requires_grad_()
    rows = torch.tensor([0, 1, 2, -1])
    loss = latent_prediction_loss(predictions, features, rows, kind="cosine", target_norm=norm)
    oracle = double(predictions)
    exact = reference.latent_prediction_loss(
        oracle, features.double(), rows, kind="cosine", target_norm=norm
    )
    assert_accurate("loss", loss, exact)
    (grad,) = gradients(loss, [predictions], torch.ones(()))
    assert grad.isfinite().all()
    assert not grad[2:].any()


# ----------------------------------------------------------------------------- any machine


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_cpu(kind, dtype):
    check_loss(17, 12, 40, dtype, kind)
    check_loss(5, 12, 40, dtype, kind, denominator=123.0)


def test_meta_tensors_give_shapes_and_gradients():
    predictions = torch.empty(7, 24, device="meta", dtype=torch.bfloat16, requires_grad=True)
    features = torch.empty(2, 5, 24, device="meta", dtype=torch.bfloat16)
    rows = torch.empty(7, device="meta", dtype=torch.int64)
    loss = latent_prediction_loss(predictions, features, rows)
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    loss.backward()
    assert (predictions.grad.shape, predictions.grad.dtype) == ((7, 24), torch.bfloat16)


def test_targets_get_no_gradient():
    predictions, features, rows = loss_case(6, 5, 24, torch.float32)
    features.requires_grad_()
    latent_prediction_loss(predictions, features, rows).backward()
    assert features.grad is None


def test_wrong_arguments_are_named():
    predictions, features, rows = loss_case(6, 5, 24, torch.float32)
    with pytest.raises(ValueError, match=r"kind must be one of \(.*'cosine'\), got 'huber'"):
        latent_prediction_loss(predictions, features, rows, kind="huber")
    with pytest.raises(ValueError, match=r"target_features must have shape \(B, N, 24\)"):
        latent_prediction_loss(predictions, features[:, :8], rows)
    with pytest.raises(ValueError, match=r"target_rows must have shape \(9,\), got \(8,\)"):
        latent_prediction_loss(predictions, features, rows[1:])
    with pytest.raises(ValueError, match="denominator must have one element"):
        latent_prediction_loss(predictions, features, rows, denominator=torch.ones(2))
    with pytest.raises(IndexError, match="target_rows holds 5"):
        latent_prediction_loss(predictions, features, torch.full_like(rows, 5))


# ----------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [24, 192, 384, 768, 1024, 1280, 1408])
def test_on_gpu(width, dtype, kind):
    check_loss(5000, 900, width, dtype, kind, "cuda")
    check_loss(50, 900, width, dtype, kind, "cuda", denominator=1e4)
    check_loss(0, 9, width, dtype, kind, "cuda")


@pytest.mark.gpu
def test_bitwise_repeatable_and_capturable():
    predictions, features, rows = loss_case(20000, 9000, 1280, torch.bfloat16, "cuda")

    def run():
        loss = latent_prediction_loss(predictions, features, rows)
        return loss.detach().clone(), *gradients(loss, [predictions], torch.ones((), device="cuda"))

    assert_repeatable_and_capturable(run)
