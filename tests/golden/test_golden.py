"""The model and the trainer against numbers recorded from the authors' released code.

`tiny_a.pth.tar` is a released-format checkpoint (64x64 images, patch 8, encoder 64 x 3,
predictor 32 x 2, 4 heads) and `tiny_a.npz` six training steps from it, float32 on CPU.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from masked_vit_kernels import latent_prediction_loss

from ijepa import IJEPA, MaskBatch, OptimConfig, ScheduleConfig, Trainer, load_official

DATA = Path(__file__).parent
# 6 steps an epoch, 3 epochs, 1 of them warm-up
SCHEDULE = ScheduleConfig(total_steps=18, warmup_steps=6)


@pytest.fixture(scope="module")
def golden():
    with np.load(DATA / "tiny_a.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture
def model():
    return load_official(DATA / "tiny_a.pth.tar", num_heads=4)


def with_settings(model, **settings):
    """The same weights under other settings."""
    other = IJEPA(dataclasses.replace(model.config, **settings))
    other.load_state_dict(model.state_dict())
    return other


def masks_of(golden, step):
    context = golden[f"context_masks_{step}"][0]  # (B, K)
    targets = golden[f"target_masks_{step}"].transpose(0, 1)  # (M, B, K') -> (B, M, K')
    return MaskBatch.from_dense(context, targets, grid=(8, 8))


def image_major(block_major):
    """(M * B, K', D) with all images of block 0 first -> (B * M * K', D), image after image."""
    shape = block_major.shape
    return block_major.view(4, 4, *shape[1:]).transpose(0, 1).reshape(-1, shape[-1])


def largest_difference(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("prune", [True, False])
def test_loss_and_gradients(golden, model, prune):
    model = with_settings(model, prune_predictor=prune, prune_target=prune)
    masks = masks_of(golden, 0)
    loss = model(golden["images_0"], masks)
    assert abs(loss.item() - golden["losses"][0].item()) < 1e-5

    loss.backward()
    recorded = {name for name in golden if name.startswith("grad.")}
    for network, prefix in (("context_encoder", "encoder"), ("predictor", "predictor")):
        for name, parameter in model.get_submodule(network).named_parameters():
            if parameter.requires_grad:
                expected = golden[f"grad.{prefix}.{name}"]
                # relative to the tensor: many a largest entry is itself below 1e-3
                tolerance = 1e-4 * min(1.0, expected.abs().max().item())
                assert largest_difference(parameter.grad, expected) < tolerance, name
                recorded.discard(f"grad.{prefix}.{name}")
    assert not recorded  # every recorded gradient was compared
    assert all(p.grad is None for p in model.target_encoder.parameters())


def test_l2_loss(golden, model):
    loss = with_settings(model, loss="l2")(golden["images_0"], masks_of(golden, 0))
    assert abs(loss.item() - golden["mse_loss_step0"].item()) < 1e-5


def test_context_features_and_predictions(golden, model):
    masks, images = masks_of(golden, 0), golden["images_0"]
    context = model.context_encoder(images, masks.context, masks.context_packing)
    assert largest_difference(context, golden["context_features"].flatten(0, 1)) < 1e-5
    predictions = model.predict(images, masks)
    assert largest_difference(predictions, image_major(golden["predictions"])) < 1e-5


def excess(normalised, golden):
    """Largest error in units of 1e-6 * (1 + |value|)."""
    expected = golden["target_features"].double()
    return ((normalised - expected).abs() / (1 + expected.abs())).max().item() / 1e-6


def test_target_features(golden, model):
    """To 1e-6, computed in float64: the recorded float32 numbers are up to .75e-6 off it."""
    features = model.double().target_encoder(golden["images_0"].double())  # (B, N, D)
    normalised = F.layer_norm(features, (64,))  # eps 1e-5
    assert excess(normalised, golden) < 1
    rows = normalised.flatten(0, 1)[masks_of(golden, 0).target_rows]
    assert largest_difference(rows, image_major(golden["target_rows"])) < 2e-6
    # 1e-6, the model's own eps, is outside the tolerance that 1e-5 meets
    assert excess(F.layer_norm(features, (64,), eps=1e-6), golden) > 3


def test_target_features_in_float32(golden, model):
    """Two float32 computations: 1e-6 on average; the largest of 16,384 errors is 8 roundings."""
    features = model.target_encoder(golden["images_0"])
    error = (F.layer_norm(features, (64,)) - golden["target_features"]).abs()
    assert error.mean() < 1e-6
    assert error.max() < 4e-6
    other = (F.layer_norm(features, (64,), eps=1e-6) - golden["target_features"]).abs()
    assert other.mean() > 2e-6
    assert other.max() > 1e-5


def test_the_context_encoder_does_not_pass_for_the_target_encoder(golden, model):
    normalised = F.layer_norm(model.context_encoder(golden["images_0"]), (64,))
    assert largest_difference(normalised, golden["target_features"]) > 1e-3


def test_the_loss_uses_the_released_eps():
    """The loss itself, in float64 on low-variance features, tells the two eps apart."""
    generator = torch.Generator().manual_seed(0)
    features = 1e-3 * torch.randn(6, 64, generator=generator, dtype=torch.float64)
    predictions = torch.zeros(6, 64, dtype=torch.float64)
    loss = latent_prediction_loss(predictions, features, torch.arange(6), kind="l2")
    assert abs(loss - F.layer_norm(features, (64,), eps=1e-5).square().mean()) < 1e-12
    assert abs(loss - F.layer_norm(features, (64,), eps=1e-6).square().mean()) > 0.1


@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": True}])
def test_six_steps(golden, model, settings):
    model = with_settings(model, **settings)
    trainer = Trainer(model, OptimConfig(), SCHEDULE)
    for step in range(6):
        result = trainer.step(golden[f"images_{step}"], masks_of(golden, step))
        assert abs(result.loss.item() - golden["losses"][step].item()) < 1e-4
        assert result.lr == pytest.approx(golden["lr"][step].item(), abs=1e-12)
        assert result.weight_decay == pytest.approx(golden["weight_decay"][step].item(), abs=1e-12)
        assert result.momentum == pytest.approx(golden["momentum"][step].item(), abs=1e-12)
        assert not result.skipped
    networks = ("context_encoder", "encoder"), ("predictor", "predictor"), ("target_encoder",) * 2
    for network, prefix in networks:
        for name, parameter in model.get_submodule(network).state_dict().items():
            difference = largest_difference(parameter, golden[f"final.{prefix}.{name}"])
            assert difference < 1e-4, f"{network}.{name}"
