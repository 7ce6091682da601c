"""The collapse panel's statistics against their definitions."""

import math

import pytest
import torch

from ijepa.evaluate.collapse import Panel, collapse_panel, effective_rank, mean_cosine, panel_line


def test_effective_rank_counts_equal_directions():
    basis = torch.linalg.qr(torch.randn(64, 12, dtype=torch.float64))[0]  # orthonormal columns
    assert effective_rank(basis) == pytest.approx(12, rel=1e-4)
    assert effective_rank(basis[:, :5] @ torch.randn(5, 5, dtype=torch.float64)) < 5
    assert effective_rank(torch.ones(64, 12, dtype=torch.float64)) == pytest.approx(1, abs=1e-3)


def test_effective_rank_is_the_published_formula():
    features = torch.randn(40, 7, dtype=torch.float64)
    sigma = [math.sqrt(v) for v in torch.linalg.eigvalsh(features.T @ features).tolist()]
    p = [s / sum(sigma) + 1e-7 for s in sigma]
    assert effective_rank(features) == pytest.approx(math.exp(-sum(q * math.log(q) for q in p)))


def test_mean_cosine_is_that_of_all_pairs():
    features = torch.randn(9, 5, dtype=torch.float64)
    pairs = [
        torch.nn.functional.cosine_similarity(features[i], features[j], dim=0).item()
        for i in range(9)
        for j in range(9)
        if i != j
    ]
    assert mean_cosine(features) == pytest.approx(sum(pairs) / len(pairs))
    assert mean_cosine(torch.ones(9, 5)) == pytest.approx(1.0)


def test_a_collapse_shows_in_every_figure():
    labels = torch.arange(64) % 4
    healthy = torch.nn.functional.one_hot(labels, 8).float() + 0.05 * torch.randn(64, 8)
    collapsed = torch.ones(64, 8) + 1e-5 * torch.randn(64, 8)
    good, bad = collapse_panel(healthy, labels), collapse_panel(collapsed, labels)
    assert good.effective_rank > 3 > 1.01 > bad.effective_rank
    assert good.cosine < 0.5 < 0.999 < bad.cosine
    assert good.feature_std > 0.1 > 1e-4 > bad.feature_std >= bad.lowest_std
    assert good.knn == 1.0 and bad.knn < 0.7
    assert good.knn_guessing == bad.knn_guessing == 0.25


def test_guessing_beside_the_knn_takes_the_commonest_of_its_neighbours():
    labels = torch.tensor([2, 2, 0, 1, 0, 1])  # fitted on the first three, asked about the others
    assert collapse_panel(torch.randn(6, 4), labels).knn_guessing == 0.0
    other = torch.tensor([0, 1, 1, 1, 0, 2])
    assert collapse_panel(torch.randn(6, 4), other).knn_guessing == pytest.approx(1 / 3)


def test_std_is_taken_over_images_dimension_by_dimension():
    features = torch.randn(50, 6, dtype=torch.float64) * torch.tensor([1, 2, 3, 4, 5, 0.1])
    panel = collapse_panel(features.float())
    expected = [torch.std(features.float()[:, d].double()).item() for d in range(6)]
    assert panel.feature_std == pytest.approx(sum(expected) / 6)
    assert panel.lowest_std == pytest.approx(min(expected))
    assert panel.knn is None


@pytest.mark.parametrize("shape", [(1, 4), (4,), (2, 3, 4)])
def test_features_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="features must have shape"):
        collapse_panel(torch.zeros(shape))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_are_counted(value):
    """The singular values of such features once ended the run."""
    features = torch.randn(20, 6)
    features[[3, 7], 2] = value
    panel = collapse_panel(features, torch.arange(20) % 4)
    assert panel == Panel(not_finite=2)
    assert panel_line(5, panel) == "step 5: target features of 2 images are not finite"
    assert collapse_panel(torch.randn(20, 6)).not_finite is None
