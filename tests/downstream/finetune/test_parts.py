"""What fine-tuning is made of, each part against its formula."""

import math

import numpy as np
import pytest
import torch
from small_runs import small_recipe

from ijepa.data.rand_augment import OPERATIONS, rand_augment
from ijepa.downstream.finetune.layer_decay import decayed_groups, layer_of
from ijepa.downstream.finetune.mixing import mixed, smoothed, soft_cross_entropy, step_generator
from ijepa.downstream.finetune.network import classifier_from
from ijepa.downstream.finetune.presets import PRESETS, FinetuneSettings
from ijepa.evaluate.drop_path import block_with_drop_path, drop_path_chances
from ijepa.evaluate.pretrained import PretrainedEncoder, evaluation_crop
from ijepa.positions import resize_positions


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    config = small_recipe("unused", model__depth=3).model
    encoder = PretrainedEncoder(config)
    with torch.no_grad():  # so that branches do something
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


@pytest.fixture
def classifier(encoder):
    return classifier_from(encoder, ("a", "b", "c"), evaluation_crop((16, 16)), seed=1)


def test_layers_are_numbered_from_the_input():
    names = {"patch_embed.proj.weight": 0, "pos_embed": 0, "blocks.0.norm1.bias": 1,
             "blocks.11.mlp.fc2.weight": 12, "norm.weight": 13, "head.bias": 13}  # fmt: skip
    assert {name: layer_of(name, 12) for name in names} == names


def test_every_parameter_has_its_layers_rate_and_decay_once(classifier):
    groups = decayed_groups(classifier, 3, 0.75, 0.05)
    by_id = {id(p): group for group in groups for p in group["params"]}
    trained = [n for n, p in classifier.named_parameters() if p.requires_grad]
    assert len(by_id) == len(trained) == sum(len(group["params"]) for group in groups)
    for name, parameter in classifier.named_parameters():
        if name == "pos_embed":
            assert id(parameter) not in by_id
            continue
        group = by_id[id(parameter)]
        layer = {"patch_embed": 0, "norm": 4, "head": 4}.get(name.split(".")[0])
        layer = int(name.split(".")[1]) + 1 if layer is None else layer
        assert group["lr_scale"] == pytest.approx(0.75 ** (4 - layer))
        is_weight = name.endswith(".weight") and "norm" not in name
        assert group["weight_decay"] == (0.05 if is_weight else 0.0)


def test_smoothed_labels():
    targets = smoothed(torch.tensor([2, 0]), 4, 0.1)
    expected = [[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]
    torch.testing.assert_close(targets, torch.tensor(expected))
    logits, labels = torch.randn(5, 4), torch.randint(4, (5,))
    torch.testing.assert_close(
        soft_cross_entropy(logits, smoothed(labels, 4, 0.1)),
        torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1),
    )


def test_mixup_is_a_blend_with_the_mirrored_batch():
    images, targets = torch.rand(5, 3, 8, 8), smoothed(torch.arange(5), 5, 0.0)
    share = np.random.default_rng([3, 7]).beta(0.8, 0.8)
    out, out_targets = mixed(images, targets, 0.8, 0.0, step_generator(3, 7))
    for row in range(5):
        other = 4 - row
        torch.testing.assert_close(out[row], share * images[row] + (1 - share) * images[other])
        torch.testing.assert_close(
            out_targets[row], (share * targets[row] + (1 - share) * targets[other]).float()
        )
    assert 0.01 < share < 0.99


def test_cutmix_counts_the_pixels_it_took():
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 2, 16, 24)
    targets, shares = smoothed(torch.arange(4), 4, 0.0), []
    for step in range(40):
        out, out_targets = mixed(images, targets, 0.0, 1.0, step_generator(0, step))
        for row in range(4):
            kept = (out[row, 0] == row).double().mean().item()
            taken = (out[row, 0] == 3 - row).double().mean().item()
            assert kept + taken == pytest.approx(1)
            assert out_targets[row, row].item() == pytest.approx(kept, abs=1e-6)
            assert out_targets[row, 3 - row].item() == pytest.approx(taken, abs=1e-6)
            assert torch.equal(out[row, 0], out[row, 1])
        shares.append(out_targets[0, 0].item())
        box = out[0, 0] != 0
        if box.any():  # one rectangle
            rows, columns = box.any(1).nonzero(), box.any(0).nonzero()
            assert box.sum() == len(rows) * len(columns)
    assert min(shares) < 0.3 and max(shares) > 0.9
    assert images[0].max() == 0  # the images themselves are left alone


def test_with_both_on_each_takes_its_turn():
    images, targets = torch.rand(4, 1, 16, 16), smoothed(torch.arange(4), 4, 0.0)
    boxes = 0
    for step in range(60):
        out, _ = mixed(images, targets, 0.8, 1.0, step_generator(1, step))
        boxes += bool(((out == images) | (out == images.flip(0))).all())
    assert 15 < boxes < 45
    same, unchanged = mixed(images, targets, 0.0, 0.0, step_generator(1, 0))
    assert same is images and unchanged is targets


def test_drop_path_leaves_out_whole_images_and_keeps_the_mean(encoder):
    assert drop_path_chances(0.25, 5) == pytest.approx((0, 0.0625, 0.125, 0.1875, 0.25))
    with pytest.raises(ValueError, match=r"drop_path must lie in \[0, 1\), got 1"):
        drop_path_chances(1.0, 5)
    tokens, images = 16, 400
    x = torch.randn(1, tokens, 16).expand(images, -1, -1).reshape(-1, 16).contiguous()
    packing = encoder.dense_packing(images, tokens, x.device)
    block = encoder.blocks[0]
    torch.manual_seed(0)
    with torch.no_grad():
        dropped = block_with_drop_path(block, x, packing, 0.4, tokens).view(images, tokens, 16)
        attention = block.attn(block.norm1(x), packing)[:tokens]
        kinds = []
        for kept_attention in (0.0, 1 / 0.6):
            middle = x[:tokens] + kept_attention * attention
            for kept_mlp in (0.0, 1 / 0.6):
                kinds.append(middle + kept_mlp * block.mlp(block.norm2(middle)))
    counts = [0, 0, 0, 0]
    for image in dropped:
        (kind,) = [k for k, e in enumerate(kinds) if torch.allclose(image, e, atol=1e-5)]
        counts[kind] += 1
    expected = [0.16, 0.24, 0.24, 0.36]
    for count, share in zip(counts, expected, strict=True):
        assert abs(count / images - share) < 4 * math.sqrt(share * (1 - share) / images)


def test_a_classifier_is_mean_pool_norm_head(encoder, classifier):
    assert classifier.head.weight.std().item() == pytest.approx(2e-5, rel=0.3)
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    outputs = []
    hook = classifier.blocks[2].register_forward_hook(lambda _m, _i, out: outputs.append(out))
    logits = classifier.classify(images)
    hook.remove()
    norm = classifier.norm
    pooled = outputs[0].view(4, 16, 16).mean(dim=1)
    normed = torch.nn.functional.layer_norm(pooled, (16,), norm.weight, norm.bias, eps=1e-6)
    torch.testing.assert_close(logits, normed @ classifier.head.weight.T + classifier.head.bias)
    with pytest.raises(ValueError, match="this encoder has no head: fine-tune it"):
        encoder.classify(images)


def test_another_size_has_resized_positions_that_stay(encoder):
    larger = classifier_from(encoder, ("a", "b"), evaluation_crop((24, 32)), seed=0)
    assert larger.config.image_size == (24, 32) and larger.grid == (6, 8)
    expected = resize_positions(encoder.pos_embed.detach(), (4, 4), (6, 8))
    torch.testing.assert_close(larger.pos_embed, expected)
    fixed = [n for n, p in larger.named_parameters() if not p.requires_grad]
    assert fixed == ["pos_embed"]
    with pytest.raises(ValueError, match="no whole patches"):
        classifier_from(encoder, ("a", "b"), evaluation_crop((18, 16)), seed=0)


def test_the_presets_are_the_papers():
    low, huge, full = (PRESETS[name] for name in ("lowshot", "lowshot-huge", "full"))
    assert (low.epochs, low.step_images, low.lr, low.weight_decay) == (50, 512, 3e-5, 5e-2)
    assert huge == FinetuneSettings(**{**low.__dict__, "weight_decay": 0.4})
    assert (low.mixup, low.cutmix, low.drop_path, low.layer_decay) == (0, 0, 0, 0.75)
    assert (full.epochs, full.step_images, full.weight_decay) == (50, 528, 0.04)
    assert full.lr == pytest.approx(1e-4 * 528 / 256)
    assert (full.mixup, full.cutmix, full.drop_path) == (0.8, 1.0, 0.25)
    assert low.rand_augment == full.rand_augment == "rand-m9-mstd0.5-inc1"
    assert low.smoothing == full.smoothing == 0.1


def test_the_learning_rate_warms_up_and_falls_every_step():
    settings = FinetuneSettings(50, 8, 1e-3, 0.05, warmup_epochs=5, min_lr=1e-6)
    assert settings.learning_rate(0, 10) == 0
    assert settings.learning_rate(25, 10) == pytest.approx(5e-4)
    assert settings.learning_rate(50, 10) == pytest.approx(1e-3)
    middle = 1e-6 + (1e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi * 22.5 / 45))
    assert settings.learning_rate(275, 10) == pytest.approx(middle)
    assert settings.learning_rate(500, 10) == pytest.approx(1e-6)
    assert settings.changed(step_images=4).lr == pytest.approx(5e-4)
    assert settings.changed(step_images=4, lr=2e-3).lr == 2e-3
    for wrong in ({"epochs": 0}, {"layer_decay": 0.0}, {"smoothing": 1.0}, {"lr": float("nan")}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must lie in"):
            settings.changed(**wrong)


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_is_drawn_by_its_key(channels):
    image = torch.randint(0, 256, (channels, 20, 28), dtype=torch.uint8)
    outs = []
    for key in (3, 3, *range(10, 60)):
        out = image.clone()
        rand_augment(out, key)
        assert out.shape == image.shape and out.dtype == torch.uint8
        outs.append(out)
    assert torch.equal(outs[0], outs[1])
    unchanged = sum(torch.equal(out, image) for out in outs[2:])
    assert 3 <= unchanged <= 30  # a quarter is left alone by the draws
    assert len({out.numpy().tobytes() for out in outs}) > 20


@pytest.mark.parametrize("number", range(len(OPERATIONS)))
def test_every_operation_is_stronger_for_more_strength(number):
    """ "inc": the further from the image itself, the higher the strength; some have none."""
    from PIL import Image

    rng = np.random.default_rng(0)
    coarse = rng.integers(30, 200, (6, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC)
    before = np.asarray(picture).astype(float)
    without_strength = number < 3

    def change(strength, sign):
        out = OPERATIONS[number](picture, strength, sign, (100, 110, 120))
        assert out.size == picture.size and out.mode == picture.mode
        return np.abs(np.asarray(out).astype(float) - before).mean()

    change(1.0, 1)  # Pillow once refused the strongest
    for sign in (1, -1):
        weak, strong = change(0.3, sign), change(0.9, sign)
        assert strong == weak if without_strength else strong > weak


def test_there_are_timms_fifteen_operations():
    assert len(OPERATIONS) == 15 and len(set(OPERATIONS)) == 15
