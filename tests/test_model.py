"""The model against I-JEPA written out image by image, in float64, with all gradients."""

from collections import Counter
from dataclasses import replace

import naive_ijepa
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ijepa import IJEPA, VIT_SIZES, MaskBatch, ModelConfig
from ijepa.masks.sizes import MaskSizes
from ijepa.positions import resize_positions, sincos_positions

# 4 x 3 patches of 4 x 6 pixels, two channels
CONFIG = ModelConfig(
    image_size=(16, 18),
    channels=2,
    patch_size=(4, 6),
    width=24,
    depth=3,
    heads=3,
    mlp_ratio=2.0,
    predictor_width=16,
    predictor_depth=2,
    predictor_heads=2,
    image_mean=(0.4, 0.5),
    image_std=(0.2, 0.3),
)
CONTEXT = [[0, 1, 5], [2, 3, 4, 5, 6, 11], [8]]
TARGETS = [[[2, 3], [7, 10, 11]], [[0], [0, 1]], [[1, 4, 5, 7], [11, 10, 9, 2]]]


def make_model(config=CONFIG, seed=0):
    """Float64, every parameter random, the two encoders unlike each other."""
    torch.manual_seed(seed)
    model = IJEPA(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def make_images(config=CONFIG, count=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, config.channels, *config.image_size)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_loss_and_gradients(model, loss, other_loss, tolerance=1e-10):
    loss.backward()
    found = gradients(model)
    model.zero_grad(set_to_none=True)
    other_loss.backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    torch.testing.assert_close(loss, other_loss, atol=tolerance, rtol=0)
    assert set(found) == set(expected)
    assert not any(name.startswith("target_encoder") for name in found)
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], atol=tolerance, rtol=tolerance, msg=name
        )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prune_predictor": False},
        {"share_predictor": True},
        {"share_predictor": True, "predictor_depth": 1},
        {"prune_target": False},
        {"loss": "l2"},
        {"target": "pixels"},
        {"target_masking": "input"},
        {"target_norm": "instance"},
        {"target_norm": "instance", "target": "pixels"},
        {"target_norm": "none"},
        {"activation_checkpointing": True},
    ],
    ids=str,
)
def test_loss_and_gradients_equal_the_written_out_model(settings):
    config = replace(CONFIG, **settings)
    model, images = make_model(config), make_images()
    masks = MaskBatch.from_lists(CONTEXT, TARGETS, config.grid)
    context = [torch.tensor(ids) for ids in CONTEXT]
    targets = [[torch.tensor(ids) for ids in image] for image in TARGETS]
    assert_same_loss_and_gradients(
        model, model(images, masks), naive_ijepa.loss(model, images, context, targets)
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("settings", [{}, {"prune_predictor": False}, {"share_predictor": True}])
def test_the_kernels_compute_the_written_out_model(settings):
    """Blocks that share patches: a gather that is wrongly promised distinct rows loses gradient."""
    config = replace(CONFIG, depth=2, **settings)
    model, images = make_model(config).float(), make_images().float()
    masks = MaskBatch.from_lists(CONTEXT, TARGETS, config.grid)
    context = [torch.tensor(ids) for ids in CONTEXT]
    targets = [[torch.tensor(ids) for ids in image] for image in TARGETS]
    assert_same_loss_and_gradients(
        model, model(images, masks), naive_ijepa.loss(model, images, context, targets), 2e-4
    )


class OpNames(TorchDispatchMode):
    """Counts the calls of the library's ops."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "masked_vit_kernels":
            self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("settings", "sums"),
    [({}, 0), ({"prune_predictor": False}, 0), ({"share_predictor": True}, 1)],
    ids=str,
)
def test_only_rows_that_repeat_are_summed(settings, sums):
    """Meta tensors take the path of CUDA tensors. The predictor's last rows are all distinct."""
    model = IJEPA(replace(CONFIG, **settings)).to("meta")
    model.prepare(3)
    masks = MaskBatch.from_lists(CONTEXT, TARGETS, CONFIG.grid).to("meta")
    with OpNames() as ops:
        loss = model(
            torch.empty(3, 2, 16, 18, device="meta"), masks, torch.empty((), device="meta")
        )
        loss.backward()
    assert ops.counts["scatter_rows"] == 1 and ops.counts["accumulate_rows"] == sums


@pytest.mark.parametrize("target_masking", ["output", "input"])
def test_padding_to_a_capacity_changes_nothing(target_masking):
    config = replace(CONFIG, target_masking=target_masking)
    model, images = make_model(config), make_images()
    context, targets = np.zeros((3, 12), bool), np.zeros((3, 2, 12), bool)
    for b in range(3):
        context[b, CONTEXT[b]] = True
        for m in range(2):
            targets[b, m, TARGETS[b][m]] = True
    exact = MaskBatch.from_boolean(context, targets, config.grid)
    padded = MaskBatch.from_boolean(
        context, targets, config.grid,
        capacities=[MaskSizes(context=17, targets=30, predictor=80, target_union=40)],
    )  # fmt: skip
    assert padded.context.shape == (17,) and padded.predictor_packing.capacity == 80
    assert model.count_elements(padded) == model.count_elements(exact) == 16 * 24
    assert_same_loss_and_gradients(model, model(images, padded), model(images, exact))


def test_an_image_without_context_or_with_an_empty_block():
    context, targets = [[], [1, 2]], [[[3, 4], [5]], [[], [0]]]
    model, images = make_model(), make_images(count=2)
    masks = MaskBatch.from_lists(context, targets, CONFIG.grid)
    as_tensors = [torch.tensor(ids, dtype=torch.long) for ids in context]
    blocks = [[torch.tensor(ids, dtype=torch.long) for ids in image] for image in targets]
    assert_same_loss_and_gradients(
        model, model(images, masks), naive_ijepa.loss(model, images, as_tensors, blocks)
    )


def test_uint8_images_are_normalised_with_the_configured_statistics():
    pixels = torch.randint(0, 256, (3, 2, 16, 18), dtype=torch.uint8)
    mean = torch.tensor(CONFIG.image_mean, dtype=torch.float64).view(2, 1, 1)
    std = torch.tensor(CONFIG.image_std, dtype=torch.float64).view(2, 1, 1)
    normalised = (pixels.double() / 255 - mean) / std
    masks = MaskBatch.from_lists(CONTEXT, TARGETS, CONFIG.grid)
    for config in (CONFIG, replace(CONFIG, target="pixels")):
        model = make_model(config)
        torch.testing.assert_close(
            model(pixels, masks), model(normalised, masks), atol=1e-5, rtol=1e-5
        )


def test_wrong_images_and_masks_are_refused():
    model = make_model()
    masks = MaskBatch.from_lists(CONTEXT, TARGETS, CONFIG.grid)
    with pytest.raises(ValueError, match=r"images must have shape \(3, 2, 16, 18\)"):
        model(make_images(count=2), masks)
    with pytest.raises(ValueError, match="masks of grid"):
        model(make_images(), MaskBatch.from_lists(CONTEXT, TARGETS, (3, 4)))


def test_bf16_autocast_stays_near_float32():
    model, images = make_model().float(), make_images().float()
    masks = MaskBatch.from_lists(CONTEXT, TARGETS, CONFIG.grid)
    exact = model(images, masks)
    exact.backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images, masks)
        context = model.context_encoder(images, masks.context, masks.context_packing)
    assert loss.dtype == context.dtype == torch.float32  # the residual stream is not rounded
    loss.backward()
    torch.testing.assert_close(loss, exact, atol=0.02, rtol=0.02)
    for name, gradient in gradients(model).items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert gradient.dtype == torch.float32 and error < 0.15, (name, error)


def test_last_layers_go_through_the_final_norm():
    encoder, images = make_model().target_encoder, make_images()
    layers = encoder.last_layers(images, 2)
    assert [tuple(layer.shape) for layer in layers] == [(3, 12, 24)] * 2
    torch.testing.assert_close(layers[-1], encoder(images))
    shorter = make_model().target_encoder
    shorter.blocks = shorter.blocks[:2]
    torch.testing.assert_close(layers[0], shorter(images))
    with pytest.raises(ValueError, match="count must be in 1 to 3"):
        encoder.last_layers(images, 4)


def test_the_encoder_takes_other_image_sizes():
    encoder = make_model().target_encoder
    assert encoder(torch.randn(2, 2, 32, 30, dtype=torch.float64)).shape == (2, 40, 24)
    with pytest.raises(ValueError, match="cannot be cut"):
        encoder(torch.randn(2, 2, 18, 30, dtype=torch.float64))


def test_positions_encode_the_column_first():
    rows, columns = 3, 5
    position = sincos_positions(8, (rows, columns)).view(rows, columns, 8)
    assert torch.equal(position[0, :, :4], position[2, :, :4])  # column half: the same in all rows
    assert torch.equal(position[:, 0, 4:], position[:, 4, 4:])  # row half: the same in all columns
    expected = [np.sin(4), np.sin(4 / 100), np.cos(4), np.cos(4 / 100)]
    np.testing.assert_allclose(position[2, 4, :4], expected, atol=1e-6)
    expected = [np.sin(2), np.sin(2 / 100), np.cos(2), np.cos(2 / 100)]
    np.testing.assert_allclose(position[2, 4, 4:], expected, atol=1e-6)
    with pytest.raises(ValueError, match="divisible by 4"):
        sincos_positions(6, (2, 2))


def test_resized_positions_keep_rows_and_columns_apart():
    position = sincos_positions(8, (4, 6))
    assert resize_positions(position, (4, 6), (4, 6)) is position
    resized = resize_positions(position, (4, 6), (7, 3)).view(7, 3, 8)
    assert torch.allclose(resized[0, :, :4], resized[6, :, :4], atol=1e-6)
    assert torch.allclose(resized[:, 0, 4:], resized[:, 2, 4:], atol=1e-6)
    # a ramp over the rows stays one, away from the border, up to the cubic's ripple
    ramp = torch.arange(8.0).repeat_interleave(8).view(1, 64, 1)
    wide = resize_positions(ramp, (8, 8), (16, 8)).view(16, 8)
    np.testing.assert_allclose(wide[4:12, 0], np.arange(4, 12) / 2 - 0.25, atol=0.05)
    with pytest.raises(ValueError, match=r"shape \(1, 30, D\)"):
        resize_positions(position, (5, 6), (7, 3))


def test_initialisation():
    config = replace(CONFIG, width=96, heads=4, predictor_width=96, patch_init_std=0.15)
    torch.manual_seed(0)
    model = IJEPA(config)
    encoder = model.context_encoder
    assert encoder.patch_embed.proj.weight.std().item() == pytest.approx(0.15, rel=0.05)
    assert encoder.blocks[2].mlp.fc2.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.predictor.mask_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))
    for a, b in zip(encoder.parameters(), model.target_encoder.parameters(), strict=True):
        assert torch.equal(a, b) and a is not b and not b.requires_grad

    torch.manual_seed(0)
    rescaled = IJEPA(replace(config, rescale_init=True)).context_encoder
    for layer, (a, b) in enumerate(zip(rescaled.blocks, encoder.blocks, strict=True), start=1):
        torch.testing.assert_close(a.attn.proj.weight * (2 * layer) ** 0.5, b.attn.proj.weight)
        torch.testing.assert_close(a.mlp.fc2.weight * (2 * layer) ** 0.5, b.mlp.fc2.weight)
        assert torch.equal(a.attn.qkv.weight, b.attn.qkv.weight)


def test_fan_in_initialisation():
    config = replace(CONFIG, width=96, heads=4, predictor_width=48, patch_init_std=0.15)
    model = IJEPA(replace(config, init="fan_in"))
    for module in (model.context_encoder.blocks, model.predictor):
        for name, layer in module.named_modules():
            if isinstance(layer, torch.nn.Linear):
                expected = layer.in_features**-0.5
                assert layer.weight.std().item() == pytest.approx(expected, rel=0.06), name
                assert not layer.bias.any()
    # what is not a block's or the predictor's linear layer stays as it was
    patch_embed = model.context_encoder.patch_embed.proj
    assert patch_embed.weight.std().item() == pytest.approx(0.15, rel=0.1)
    assert model.predictor.mask_token.std().item() == pytest.approx(0.02, rel=0.4)


def test_instance_normalised_targets_need_every_patch():
    with pytest.raises(ValueError, match="every patch of an image, which target_masking"):
        replace(CONFIG, target_norm="instance", target_masking="input")


@pytest.mark.parametrize(
    ("size", "patch", "millions"),
    [
        ("T", 16, 5.5),
        ("S", 16, 21.6),
        ("B", 16, 85.8),
        ("L", 16, 303.3),
        ("H", 14, 630.8),
        ("G", 16, 1011.4),
    ],
)
def test_sizes(size, patch, millions):
    """Parameters of the ViTs without class token and head, positions included."""
    config = ModelConfig(patch_size=(patch, patch), **VIT_SIZES[size])
    with torch.device("meta"):
        encoder = IJEPA(replace(config, predictor_heads=12)).context_encoder
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.15)


def test_names_are_the_released_ones():
    model = IJEPA(CONFIG)
    names = set(model.context_encoder.state_dict())
    assert names == set(model.target_encoder.state_dict())
    block = {f"{module}.{kind}" for module in ("norm1", "attn.qkv", "attn.proj", "norm2",
             "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")}  # fmt: skip
    assert names == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
                     "norm.weight", "norm.bias"} | {
        f"blocks.{i}.{name}" for i in range(3) for name in block
    }  # fmt: skip
    assert set(model.predictor.state_dict()) == {
        "mask_token", "predictor_pos_embed", "predictor_embed.weight", "predictor_embed.bias",
        "predictor_norm.weight", "predictor_norm.bias", "predictor_proj.weight",
        "predictor_proj.bias",
    } | {f"predictor_blocks.{i}.{name}" for i in range(2) for name in block}  # fmt: skip


@pytest.mark.parametrize("shape", [(2, 16, 18), (2, 16, 18, 2), (2, 1, 16, 18)])
def test_an_encoder_names_the_shape_it_takes(shape):
    encoder = IJEPA(CONFIG).target_encoder
    with pytest.raises(ValueError, match=r"images must have shape \(B, 2, H, W\), got "):
        encoder(torch.zeros(shape, dtype=torch.uint8))


def test_an_encoder_takes_no_other_whole_numbers():
    """They were taken for normalised images."""
    encoder = IJEPA(CONFIG).target_encoder
    with pytest.raises(ValueError, match="must be uint8, 0 to 255, or floating point"):
        encoder(torch.zeros(1, 2, 16, 18, dtype=torch.int64))
