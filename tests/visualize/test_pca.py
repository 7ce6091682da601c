"""Patch features as colours."""

import pytest
import torch

from ijepa.visualize.pca import pca_colours


def test_the_main_direction_decides_and_alike_patches_have_one_colour():
    """Two kinds of patches that differ most along one direction: two colours, whatever the rest."""
    kinds = torch.randint(0, 2, (3, 20))
    direction = torch.randn(16)
    features = 50 * kinds[..., None] * direction + 0.01 * torch.randn(3, 20, 16)
    (colours,) = pca_colours([features], "each")
    assert colours.shape == (3, 20, 3) and colours.dtype == torch.uint8
    first = colours[..., 0].int()
    apart = (first[kinds == 1].float().mean() - first[kinds == 0].float().mean()).abs()
    assert apart > 60
    assert (first[kinds == 1].max() - first[kinds == 1].min()) <= 2


def test_a_turned_network_has_the_same_colours():
    """Its own basis, turned towards the first one's, undoes a rotation of the features."""
    features = torch.randn(2, 30, 12) * torch.linspace(3, 0.1, 12)
    rotation, _ = torch.linalg.qr(torch.randn(12, 12))
    first, turned = pca_colours([features, features @ rotation + 5], "each")
    assert (first.int() - turned.int()).abs().max() <= 1


def test_one_basis_shows_what_two_checkpoints_share():
    features = torch.randn(2, 30, 12) * torch.linspace(3, 0.1, 12)
    moved = features.clone()
    moved[0, 0] += 100 * torch.ones(12) / 12**0.5
    first, second = pca_colours([features, moved], "one")
    same = (first == second).all(dim=2)
    assert same.flatten()[1:].all() and not same[0, 0]


def test_few_directions_are_enough():
    (colours,) = pca_colours([torch.randn(1, 2, 4)], "each")
    assert (colours[..., 2] == 128).all()  # the middle: there is no third direction


@pytest.mark.parametrize(
    ("features", "basis", "message"),
    [
        ([], "each", "at least one network"),
        ([torch.zeros(1, 4, 3), torch.zeros(1, 5, 3)], "each", "the same patches"),
        ([torch.zeros(1, 4, 3), torch.zeros(1, 4, 2)], "one", "one width, got 3, 2"),
        ([torch.full((1, 4, 3), torch.nan)], "each", "not finite"),
    ],
)
def test_what_does_not_fit_together_is_refused(features, basis, message):
    with pytest.raises(ValueError, match=message):
        pca_colours(features, basis)
