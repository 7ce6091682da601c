"""R2 around the position's mean, shares of variance, the encoder's gradient; when they warn."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from ijepa import IJEPA, MaskBatch
from ijepa.config import ModelConfig
from ijepa.evaluate import learning
from ijepa.evaluate.learning import learning_line, measure_learning
from ijepa.evaluate.warnings import learning_warnings

GRID = (3, 4)
CONFIG = ModelConfig(
    image_size=(12, 16), patch_size=(4, 4), width=16, depth=2, heads=2, predictor_width=16,
    predictor_depth=1, predictor_heads=2,
)  # fmt: skip
CONTEXT = [[0, 1, 2], [3, 7], [0, 4, 8, 9]]
TARGETS = [[[5, 6], [6, 10]], [[0], [1, 2, 6]], [[6], [5, 6, 7]]]


def batches_of(count, size=(12, 16)):
    """As many batches of three images; positions 5 and 6 occur in several."""
    masks = MaskBatch.from_lists(CONTEXT, TARGETS, GRID)
    return [
        (torch.randint(0, 256, (3, 3, *size), dtype=torch.uint8), masks) for _ in range(count)
    ]


def by_hand(model, batches, norm):
    """The formulas of the module, image by image and row by row, in float64."""
    every, rows, predictions = [], [], []
    with torch.no_grad():
        for images, masks in batches:
            features = model.patch_targets(images).double()
            predicted = iter(model.predict(images, masks)[masks.targets >= 0].double())
            for image, blocks in zip(features, TARGETS, strict=True):
                if norm == "layer":
                    image = F.layer_norm(image, image.shape[1:])
                elif norm == "instance":
                    spread = (image.var(0, correction=0) + 1e-5).sqrt()
                    image = (image - image.mean(0)) / spread
                every.append(image)
                for position in (n for block in blocks for n in block):
                    rows.append((position, image[position]))
                    predictions.append(next(predicted))
    t = torch.stack(every)  # (B, N, D)
    g = t.mean((0, 1))
    total = (t - g).square().sum()
    position = t.shape[0] * (t.mean(0) - g).square().sum() / total
    image = t.shape[1] * (t.mean(1) - g).square().sum() / total
    around = 0.0
    for place in {place for place, _ in rows}:
        here = torch.stack([row for where, row in rows if where == place])
        if len(here) > 1:
            around += len(here) * here.var(0, correction=1).sum()
    wanted = torch.stack([row for _, row in rows])
    error = (torch.stack(predictions) - wanted).square().sum()
    return 1 - error / around, position, image, 1 - position - image


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_norm": "instance"},
        {"target_norm": "none"},
        {"target": "pixels", "target_norm": "instance"},
        {"prune_target": False},
    ],
    ids=str,
)
def test_the_figures_follow_the_formulas(settings):
    model = IJEPA(dataclasses.replace(CONFIG, init="fan_in", **settings))
    with torch.no_grad():
        for parameter in model.target_encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batches = batches_of(4)
    found = measure_learning(model, batches)
    expected = by_hand(model, batches, model.config.target_norm)
    shares = (found.r2, found.position_share, found.image_share, found.interaction_share)
    assert shares == pytest.approx(tuple(value.item() for value in expected), rel=1e-4, abs=1e-5)
    if model.config.target_norm == "instance":
        assert found.image_share == pytest.approx(0, abs=1e-6)


def test_targets_masked_at_the_input_are_compared_with_themselves():
    """Those of the loss: what the encoder makes of the block alone."""
    model = IJEPA(dataclasses.replace(CONFIG, target_masking="input"))
    batches = batches_of(3)
    with torch.no_grad():
        rows = []
        for images, masks in batches:
            features, target_rows = model.targets(images, masks)
            rows.append(features[target_rows[target_rows >= 0]])

    def predict(images, masks):
        padded = torch.zeros(masks.targets.shape[0], 16)
        padded[masks.targets >= 0] = F.layer_norm(rows.pop(0), (16,))
        return padded

    gradient = learning._encoder_gradient_norm
    learning._encoder_gradient_norm, model.predict = lambda *_: 1.0, predict
    try:
        assert measure_learning(model, batches).r2 == pytest.approx(1, abs=1e-6)
    finally:
        learning._encoder_gradient_norm = gradient


def test_the_gradient_is_the_first_batchs_and_leaves_nothing_behind():
    model = IJEPA(CONFIG)
    batches = batches_of(2)
    found = measure_learning(model, batches)
    assert all(parameter.grad is None for parameter in model.parameters())
    model(*batches[0]).backward()
    squares = [p.grad.square().sum() for p in model.context_encoder.parameters() if p.requires_grad]
    assert found.encoder_grad_norm == pytest.approx(torch.stack(squares).sum().sqrt().item())
    assert f"encoder gradient {found.encoder_grad_norm:.1e}" in learning_line(found)


def test_nothing_to_compare_gives_no_figures():
    model = IJEPA(CONFIG)
    alike = torch.zeros(3, 3, 12, 16, dtype=torch.uint8)
    masks = MaskBatch.from_lists(CONTEXT, TARGETS, GRID)
    assert measure_learning(model, [(alike, masks)]) is None  # no variance around positions
    with torch.no_grad():
        model.predictor.mask_token.fill_(float("nan"))
    assert measure_learning(model, batches_of(2)) is None


HEALTHY = {"step": 2000, "r2": 0.2, "encoder_grad_norm": 0.01, "image_share": 0.3,
           "centred_rank": 30.0}  # fmt: skip


@pytest.mark.parametrize(
    ("figure", "value", "kind", "says"),
    [
        ("r2", 0.012, "context ignored", "R2 0.012 after 2,000 steps"),
        ("encoder_grad_norm", 3e-5, "encoder stands still", "norm 3.0e-05"),
        ("image_share", 0.71, "easy targets", "71 % of the targets' variance"),
        ("centred_rank", 9.0, "few directions", "centred effective rank 9.0 of 96"),
    ],
)
def test_each_limit_has_its_warning_and_what_to_try(figure, value, kind, says):
    (found,) = learning_warnings(HEALTHY | {figure: value}, 96, 100).items()
    assert found[0] == kind
    assert says in found[1] and "try --model." in found[1]


def test_health_short_runs_warmup_and_missing_figures_warn_of_nothing():
    assert learning_warnings(HEALTHY, 96, 100) == {}
    bad = {"step": 999, "r2": 0.0, "centred_rank": 1.0}
    assert learning_warnings(bad, 96, 0) == {}
    assert learning_warnings(bad | {"step": 2000}, 96, 3000) == {}
    assert learning_warnings({"step": 2000, "r2": None}, 96, 0) == {}
