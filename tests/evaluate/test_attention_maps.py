"""Attention weights and the predictor's matches, against what the networks themselves compute."""

import pytest
import torch

from ijepa.config import ModelConfig
from ijepa.evaluate.attention_maps import attention_weights
from ijepa.evaluate.learning import normalised_targets
from ijepa.evaluate.matches import prediction_matches
from ijepa.masks.batch import MaskBatch
from ijepa.model import IJEPA

CONFIG = ModelConfig(
    image_size=(16, 16), patch_size=(4, 4), width=16, depth=2, heads=2,
    predictor_width=8, predictor_depth=1, predictor_heads=1, init="fan_in",
)  # fmt: skip


@pytest.fixture
def model():
    return IJEPA(CONFIG).eval()


def test_the_weights_are_those_that_the_block_mixes_values_with(model):
    encoder, images = model.target_encoder, torch.randint(0, 256, (3, 3, 16, 16)).byte()
    seen = {}
    block = encoder.blocks[1].attn
    block.qkv.register_forward_hook(lambda _m, _i, out: seen.update(qkv=out))
    block.proj.register_forward_hook(lambda _m, given, _o: seen.update(mixed=given[0]))
    weights = attention_weights(encoder, images)
    assert weights.shape == (3, 2, 16, 16)
    values = seen["qkv"].view(3, 16, 3, 2, 8)[:, :, 2].transpose(1, 2)  # (B, H, N, d)
    mixed = (weights @ values).transpose(1, 2).reshape(48, 16)
    torch.testing.assert_close(mixed, seen["mixed"])
    first = attention_weights(encoder, images, 0)
    assert not torch.allclose(first, weights)
    with pytest.raises(ValueError, match="block must be in -2 to 1, got 2"):
        attention_weights(encoder, images, 2)


def _masks():
    return MaskBatch.from_lists(
        [[0, 1, 2], [5, 6]], [[[7, 8], [9, 10, 11]], [[12], [13, 14]]], grid=(4, 4)
    )


def test_the_maps_are_means_of_cosines(model):
    images, masks = torch.randint(0, 256, (2, 3, 16, 16)).byte(), _masks()
    found = prediction_matches(model, images, masks)
    targets = normalised_targets(model.patch_targets(images), "layer")
    predictions = model.predict(images, masks)
    mean = targets.mean(dim=(0, 1))
    rows = iter(predictions[masks.targets >= 0])
    for image in range(2):
        for block, ids in enumerate(masks.targets_of(image)):
            cosines = torch.stack(
                [
                    torch.cosine_similarity((next(rows) - mean)[None, None], targets - mean, dim=2)
                    for _ in ids
                ]
            )
            torch.testing.assert_close(found.maps[image, block], cosines.mean(dim=0))
    assert (found.place_chance, found.image_chance) == (1 / 16, 1 / 2)


def test_a_predictor_that_knows_finds_every_place_and_image(model, monkeypatch):
    images, masks = torch.randint(0, 256, (2, 3, 16, 16)).byte(), _masks()
    targets = normalised_targets(model.patch_targets(images), "layer").flatten(0, 1)
    rows = masks.target_rows.clamp(min=0)
    monkeypatch.setattr(model, "predict", lambda *_: targets[rows])
    found = prediction_matches(model, images, masks)
    assert (found.place, found.image) == (1.0, 1.0)
    monkeypatch.setattr(model, "predict", lambda *_: targets[(rows + 1) % 32])
    assert prediction_matches(model, images, masks).place < 0.5


def test_a_network_that_diverged_is_named(model):
    with torch.no_grad():
        model.target_encoder.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="diverged"):
        prediction_matches(model, torch.randint(0, 256, (2, 3, 16, 16)).byte(), _masks())
