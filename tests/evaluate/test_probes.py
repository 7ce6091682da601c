"""Frozen features and probes: what is pooled, and whether the probes tell signal from noise."""

import pytest
import torch
from small_runs import small_recipe

from ijepa.evaluate import encoder_features, knn_accuracy, linear_probe_accuracy, pixel_features
from ijepa.evaluate.closing import closing_table
from ijepa.evaluate.guessing import commonest_class_accuracy
from ijepa.evaluate.images import LabelledImages, ProbesNotFitted
from ijepa.evaluate.knn import knn_accuracies
from ijepa.model import IJEPA


@pytest.fixture(scope="module")
def model():
    recipe = small_recipe("unused", model__depth=5)
    model = IJEPA(recipe.model)
    with torch.no_grad():  # a final norm that does something, and a target unlike the context
        for parameter in model.target_encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (10, 3, 16, 16), dtype=torch.uint8)


def test_last_is_the_mean_of_the_encoders_output(model, images):
    features = encoder_features(model.target_encoder, images, batch_size=4)
    with torch.no_grad():
        expected = model.target_encoder(images).mean(dim=1)
    torch.testing.assert_close(features.last, expected)
    assert not torch.allclose(features.last, model.context_encoder(images).mean(dim=1), atol=1e-3)


def test_last4_applies_the_final_norm_to_each_of_the_last_four_blocks(model, images):
    encoder, outputs = model.target_encoder, []
    hooks = [
        block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        for block in encoder.blocks
    ]
    with torch.no_grad():
        encoder(images)
        per_block = [
            torch.nn.functional.layer_norm(
                output, (16,), encoder.norm.weight, encoder.norm.bias, eps=1e-6
            ).view(10, 16, 16)
            for output in outputs
        ]  # (B, N, D) each
    for hook in hooks:
        hook.remove()
    expected = torch.cat([output.mean(dim=1) for output in per_block[1:]], dim=1)
    features = encoder_features(encoder, images)
    assert features.last4.shape == (10, 4 * 16)
    torch.testing.assert_close(features.last4, expected)
    torch.testing.assert_close(features.last4[:, -16:], features.last)


def test_pixels_are_normalised_and_large_images_averaged():
    images = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    rows = pixel_features(images, mean, std)
    assert rows.shape == (3, 3 * 21 * 32)
    whole = pixel_features(images, mean, std, longest_side=96)
    expected = (images[1, 2, 5, 7].item() / 255 - 0.6) / 0.4
    assert whole.view(3, 3, 64, 96)[1, 2, 5, 7].item() == pytest.approx(expected, rel=1e-5)


def test_knn_is_the_weighted_vote_of_the_nearest():
    train, test = torch.randn(30, 6, dtype=torch.float64), torch.randn(12, 6, dtype=torch.float64)
    train_labels, test_labels = torch.randint(3, (30,)), torch.randint(3, (12,))
    mean, correct = train.mean(dim=0), 0
    for row, label in zip(test, test_labels.tolist(), strict=True):
        cosines = [
            torch.nn.functional.cosine_similarity(row - mean, other - mean, dim=0).item()
            for other in train
        ]
        nearest = sorted(range(30), key=lambda i: -cosines[i])[:5]
        votes = [0.0, 0.0, 0.0]
        for i in nearest:
            votes[train_labels[i]] += torch.tensor(cosines[i] / 0.07).exp().item()
        correct += votes.index(max(votes)) == label
    found = knn_accuracies(
        train, train_labels, test, test_labels, neighbours=(1, 5, 99), test_rows=5, train_rows=4
    )[5]
    assert found == pytest.approx(correct / 12)


def test_a_linear_probe_finds_a_linear_signal_and_no_more():
    labels = torch.arange(600) % 3
    signal = torch.nn.functional.one_hot(labels, 3).float()
    noise = torch.randn(600, 3)
    # scales that an unstandardised, penalised fit could not cope with
    features = torch.cat([1e-3 * (signal + 0.1 * noise), 1e3 * torch.randn(600, 5)], dim=1) + 7.0
    train, test = slice(0, 450), slice(450, 600)
    split = (features[train], labels[train], features[test], labels[test])
    assert linear_probe_accuracy(*split) > 0.97
    shuffled = labels[torch.randperm(600)]
    chance = linear_probe_accuracy(features[train], shuffled[train], features[test], shuffled[test])
    assert 0.15 < chance < 0.55


def test_the_penalty_is_chosen_without_the_test_rows():
    features, labels = torch.randn(200, 20), torch.randint(2, (200,))
    one = linear_probe_accuracy(features, labels, features[:50], labels[:50])
    other = linear_probe_accuracy(features, labels, features[:50], 1 - labels[:50])
    assert one == pytest.approx(1 - other)


def test_the_penalty_is_chosen_by_rows_of_all_classes():
    """Once every fifth row chose: of labels that repeat every ten rows, two classes of ten."""
    labels = torch.arange(1500) % 10
    features = 0.5 * torch.randn(1500, 40)
    weak = torch.nn.functional.one_hot(labels, 10).float()
    # Small directions, which only a weak penalty lets the probe use, tell eight of the classes.
    features[:, :10] += weak * torch.where(torch.arange(10) % 5 == 0, 3.0, 0.0)
    features[:, 10:20] = features[:, 20:30] + 0.02 * (weak + 0.1 * torch.randn(1500, 10))
    train, test = slice(0, 1000), slice(1000, 1500)
    split = (features[train], labels[train], features[test], labels[test])
    chosen = linear_probe_accuracy(*split)
    each = [linear_probe_accuracy(*split, penalties=(p,)) for p in (1e-2, 1e-3, 1e-4, 1e-5)]
    assert max(each) - min(each) > 0.1
    assert chosen > max(each) - 0.03


def test_probes_refuse_shapes_that_do_not_belong_together():
    with pytest.raises(ValueError, match="features must have shapes"):
        linear_probe_accuracy(torch.zeros(4, 3), torch.zeros(4), torch.zeros(4, 2), torch.zeros(4))
    with pytest.raises(ValueError, match="test features"):
        knn_accuracy(
            torch.zeros(4, 3), torch.zeros(4).long(), torch.zeros(4, 3), torch.zeros(5).long()
        )


def test_the_closing_table_has_every_row_and_every_task(model):
    labels = {"left": torch.arange(20) % 2, "right": torch.arange(20) % 3}
    images = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)
    images[::2] //= 4  # half of them are dark: any features tell "left"
    rows = closing_table(model, IJEPA(model.config), LabelledImages(images, labels, images, labels))
    poolings = ("last block", "last 4 blocks", "last 4, mean and std",
                "last, 2x2 regions")  # fmt: skip
    assert [row.features for row in rows] == [
        *(f"pretrained, {pooling}" for pooling in poolings),
        *(f"random network, {pooling}" for pooling in poolings),
        "raw pixels",
    ]
    for row in rows:
        assert set(row.scores) == {"left", "right"}
        assert row.scores["left"].linear == 1.0
    assert [row.scores for row in rows[:4]] != [row.scores for row in rows[4:8]]


def test_guessing_knows_the_fitted_labels_alone():
    """Four balanced classes; the draw that is held out happens to have many of one of them."""
    labels = torch.arange(4).repeat_interleave(75)
    held_out = torch.zeros(300, dtype=torch.bool)
    for label, count in enumerate((9, 13, 15, 23)):  # 38.3 % are of class 3
        held_out[(labels == label).nonzero()[:count]] = True
    fitted, test = {"class": labels[~held_out]}, {"class": labels[held_out]}
    images = torch.zeros(300, 3, 4, 4, dtype=torch.uint8)
    probed = LabelledImages(images[~held_out], fitted, images[held_out], test)
    assert probed.chance == {"class": pytest.approx(9 / 60)}
    assert commonest_class_accuracy(test["class"], fitted["class"]) == pytest.approx(52 / 240)


def test_labels_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="got 0 fitted and 3 test labels"):
        commonest_class_accuracy(torch.zeros(0).long(), torch.zeros(3).long())


@pytest.mark.parametrize(("fitted", "tested"), [(1, 1), (2, 0), (0, 5)])
def test_too_few_images_for_probes_are_counted(fitted, tested):
    images, labels = torch.zeros(9, 3, 4, 4, dtype=torch.uint8), torch.zeros(9).long()
    with pytest.raises(ProbesNotFitted, match=f"there are {fitted} and {tested}"):
        LabelledImages(
            images[:fitted], {"a": labels[:fitted]}, images[:tested], {"a": labels[:tested]}
        )
