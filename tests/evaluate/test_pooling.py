"""Poolings of the closing table, and whitening."""

import pytest
import torch

from ijepa.config import ModelConfig
from ijepa.evaluate import encoder_features, knn_accuracy
from ijepa.evaluate.pooling import LAST, LAST4, MEAN_AND_STD, REGIONS, pooled_features
from ijepa.evaluate.whitening import RIDGE, whiten
from ijepa.vit import Encoder


@pytest.fixture(scope="module")
def encoder():
    return Encoder(
        ModelConfig(image_size=(24, 32), patch_size=(4, 4), width=16, depth=5, heads=2)
    ).double()


def test_poolings_are_what_their_names_say(encoder):
    images = torch.randint(0, 256, (5, 3, 24, 32), dtype=torch.uint8)
    pooled = pooled_features(encoder, images, batch_size=2)
    with torch.no_grad():
        layers = encoder.last_layers(images, 4)
    paper = encoder_features(encoder, images)
    torch.testing.assert_close(pooled[LAST], paper.last)
    torch.testing.assert_close(pooled[LAST4], paper.last4)
    every = torch.cat(layers, dim=2).float()
    std = (every - every.mean(1, keepdim=True)).square().mean(1).sqrt()
    torch.testing.assert_close(pooled[MEAN_AND_STD], torch.cat([every.mean(1), std], dim=1))
    quarters = layers[-1].float().view(5, 2, 3, 2, 4, 16).mean((2, 4))  # (B, 2, 2, D)
    regions = pooled[REGIONS].view(5, 16, 2, 2).permute(0, 2, 3, 1)
    torch.testing.assert_close(regions, quarters)


def rows_of_two_kinds(n):
    """Loud directions that say nothing about the label, and a quiet one that says all."""
    labels = torch.arange(n) % 2
    rows = torch.randn(n, 6) * torch.tensor([9.0, 7.0, 5.0, 1.0, 1.0, 0.3])
    rows[:, 5] = 0.05 * rows[:, 5] + 0.3 * (2.0 * labels - 1)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6))
    return rows @ rotation + 3.0, labels, rotation


def test_whitening_finds_what_is_quiet():
    train, labels, rotation = rows_of_two_kinds(400)
    test = torch.randn(1, 6)  # whatever: another draw in the same directions
    test, test_labels, other = rows_of_two_kinds(300)
    test = (test - 3.0) @ other.T @ rotation + 3.0
    plain = knn_accuracy(train, labels, test, test_labels)
    white = knn_accuracy(*_white(train, labels, test, test_labels))
    assert white > 0.95 > 0.8 > plain


def _white(train, labels, test, test_labels):
    white_train, white_test = whiten(train, test)
    return white_train, labels, white_test, test_labels


def test_whitened_products_are_those_of_the_inverse_covariance():
    train, _, _ = rows_of_two_kinds(500)
    test = torch.randn(50, 6) * 4
    found, found_test = whiten(train, test)
    wide = train.double()
    covariance = torch.cov(wide.T, correction=0)
    inverse = torch.linalg.inv(covariance + RIDGE * covariance.trace() / 6 * torch.eye(6))
    expected = (test.double() - wide.mean(0)) @ inverse @ (wide - wide.mean(0)).T
    torch.testing.assert_close(found_test @ found.T, expected.float(), rtol=1e-4, atol=1e-4)


def test_fewer_rows_than_features_and_constant_ones():
    train = torch.zeros(3, 8)
    train[:, 1] = torch.tensor([1.0, 2.0, 4.0])
    for rows in whiten(train, train + 1):
        assert rows.isfinite().all()
    for rows in whiten(torch.ones(4, 8), torch.ones(2, 8)):
        assert not rows.any()


def test_features_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 8\) and \(2, 7\)"):
        whiten(torch.zeros(3, 8), torch.zeros(2, 7))
