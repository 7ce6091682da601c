"""Loading an encoder and embedding images with it: every kind of source, size and picture."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import photographs, small_recipe

import ijepa
from ijepa.data.decode import ImageError
from ijepa.evaluate.pretrained import PretrainedEncoder, evaluation_crop
from ijepa.positions import resize_positions, sincos_positions
from ijepa.train.checkpoint import METADATA, CheckpointError, load_checkpoint
from ijepa.train.pretrain import pretrain

ROOT = Path(__file__).parents[2]
RELEASED = ROOT / "tests/golden/tiny_a.pth.tar"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IJEPA_CACHE", str(folder / "cache"))
        pretrain(small_recipe(folder / "run", train__steps=2, model__depth=5))
    return folder / "run"


@pytest.fixture(scope="module")
def encoder(run):
    encoder = ijepa.load_pretrained(run)
    with torch.no_grad():  # a final norm that does something
        encoder.norm.weight.add_(0.3 * torch.randn(16))
        encoder.norm.bias.add_(0.3 * torch.randn(16))
    return encoder


def pictures(count, size=(16, 16)):
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8)


def test_a_run_opens_by_its_folder_a_checkpoint_and_its_weights(run):
    checkpoint = load_checkpoint(run)
    sources = (run, str(run), run / "checkpoints", checkpoint.path,
               checkpoint.path / "weights.safetensors", checkpoint.path / METADATA)  # fmt: skip
    for source in sources[:5]:
        encoder = ijepa.load_pretrained(source)
        assert not encoder.training
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
        for name, value in encoder.state_dict().items():
            assert torch.equal(value, checkpoint.weights[f"target_encoder.{name}"])
    context = ijepa.load_pretrained(run, network="context_encoder").state_dict()
    assert torch.equal(context["norm.bias"], checkpoint.weights["context_encoder.norm.bias"])
    assert not torch.equal(context["norm.bias"], encoder.state_dict()["norm.bias"])


def test_weights_in_use_do_not_hang_on_the_checkpoints_file(run, tmp_path):
    """A mapped file that is overwritten would change, or kill, the process."""
    encoder = ijepa.load_pretrained(run)
    before = encoder.fingerprint()
    path = load_checkpoint(run).path / "weights.safetensors"
    whole = path.read_bytes()
    with path.open("r+b") as file:
        file.write(bytes(len(whole)))
    try:
        assert encoder.fingerprint() == before
        with pytest.raises(CheckpointError, match="is damaged"):
            ijepa.load_pretrained(run)
    finally:
        path.write_bytes(whole)


def test_a_released_checkpoint_opens():
    official = ijepa.load_official(RELEASED, num_heads=4)
    images = pictures(2, (64, 64))
    for network in ("target_encoder", "context_encoder"):
        encoder = ijepa.load_pretrained(RELEASED, num_heads=4, network=network)
        expected = official.get_submodule(network)(images).mean(dim=1)
        torch.testing.assert_close(encoder.embed(images), expected)
    with pytest.raises(ValueError, match="no ViT of width 64 is known, give num_heads"):
        ijepa.load_pretrained(RELEASED)


def test_what_is_no_source_is_told_what_one_is(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing at .*none: a source is the folder of a"):
        ijepa.load_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match=r"is no source of an encoder: .*released \.pth\.tar"):
        ijepa.load_pretrained(tmp_path)
    with pytest.raises(ValueError, match="network must be one of target_encoder, context_encoder"):
        ijepa.load_pretrained(run, network="predictor")
    with pytest.raises(ValueError, match="says that it has 2 heads, not 4"):
        ijepa.load_pretrained(run, num_heads=4)


def test_features_are_normed_blocks_averaged_over_patches(encoder):
    images, outputs = pictures(3), []
    hooks = [
        block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        for block in encoder.blocks
    ]
    encoder(images)
    for hook in hooks:
        hook.remove()
    norm = encoder.norm
    normed = [
        torch.nn.functional.layer_norm(x, (16,), norm.weight, norm.bias, eps=1e-6).view(3, 16, 16)
        for x in outputs
    ]
    every = torch.cat(normed[1:], dim=2)
    torch.testing.assert_close(encoder.embed(images, layers="last4", pool=None), every)
    torch.testing.assert_close(encoder.embed(images, layers="last4"), every.mean(dim=1))
    torch.testing.assert_close(encoder.embed(images, pool=None), normed[-1])
    features = encoder.embed(images)
    torch.testing.assert_close(features, normed[-1].mean(dim=1))
    assert features.dtype == torch.float32 and not features.requires_grad


def test_another_size_is_embedded_with_resized_positions(encoder):
    images = pictures(2, (24, 12))
    resized = encoder.embed(images, pool=None)
    assert resized.shape == (2, 18, 16)
    positions = resize_positions(sincos_positions(16, (4, 4)), (4, 4), (6, 3))
    torch.testing.assert_close(encoder.pos_embed, sincos_positions(16, (4, 4)))
    kept, grid = encoder.pos_embed, encoder.grid
    try:
        encoder.pos_embed, encoder.grid = torch.nn.Parameter(positions, False), (6, 3)
        torch.testing.assert_close(encoder.embed(images, pool=None), resized)
    finally:
        encoder.pos_embed, encoder.grid = kept, grid


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (pictures(2, (18, 16)), {}, "18x16 pixels are no whole patches of 4x4: .* is 16x16"),
        (pictures(2).float(), {}, r"must be uint8 of shape \(B, 3, H, W\)"),
        (pictures(2)[:, :1], {}, r"got torch.uint8 \(2, 1, 16, 16\)"),
        (pictures(2)[0], {}, r"got torch.uint8 \(3, 16, 16\)"),
        (pictures(2), {"layers": "last3"}, "layers must be one of last, last4, got 'last3'"),
        (pictures(2), {"pool": "max"}, "pool must be 'mean' or None, got 'max'"),
    ],
)
def test_other_images_are_refused(encoder, images, options, message):
    with pytest.raises(ValueError, match=message):
        encoder.embed(images, **options)


def test_files_and_pictures_give_the_same_pixels(encoder, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / "turned.png", exif=turned)
    batch = encoder.preprocess(
        [tmp_path / "a.png", str(tmp_path / "a.png"), picture, tmp_path / "turned.png",
         Image.open(tmp_path / "turned.png")]
    )  # fmt: skip
    assert batch.shape == (5, 3, 16, 16) and batch.dtype == torch.uint8
    expected = torch.from_numpy(pixels).permute(2, 0, 1)
    for row in batch[:3]:
        assert torch.equal(row, expected)  # of a procedural run: the whole image
    for row in batch[3:]:
        assert torch.equal(row, expected.rot90(-1, (1, 2)))
    assert torch.equal(encoder.preprocess(picture), batch[2:3])


def test_photographs_are_cut_as_the_paper_cuts_them(tmp_path, monkeypatch):
    crop = evaluation_crop((224, 224))
    assert (crop.crop_ratio, crop.interpolation) == (224 / 256, "bicubic")
    assert evaluation_crop((448, 448)).crop_ratio == 1.0
    settings = photographs(tmp_path / "photos", 8)
    pretrain(small_recipe(tmp_path / "run", train__steps=1, **settings))
    encoder = ijepa.load_pretrained(tmp_path / "run")
    assert encoder.transform == evaluation_crop((16, 16))
    assert encoder.preprocess(tmp_path / "photos/class-0/0.png").shape == (1, 3, 16, 16)


def test_an_unreadable_picture_is_named(encoder, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    for name in ("broken.jpg", "none.jpg"):
        with pytest.raises(ImageError, match=f"{name}: "):
            encoder.preprocess([tmp_path / name])
    with pytest.raises(ValueError, match="at least one path"):
        encoder.preprocess([])


def test_the_fingerprint_is_of_all_that_decides_about_features(run):
    encoder = ijepa.load_pretrained(run)
    same, config = encoder.fingerprint(), encoder.config
    assert ijepa.load_pretrained(load_checkpoint(run).path).fingerprint() == same
    assert ijepa.load_pretrained(run, network="context_encoder").fingerprint() != same
    others = (
        dataclasses.replace(config, heads=1),
        dataclasses.replace(config, image_mean=(0.5, 0.5, 0.5)),
    )
    for other in others:
        assert PretrainedEncoder(other, encoder.state_dict()).fingerprint() != same
    missing = {name: value for name, value in encoder.state_dict().items() if name != "norm.bias"}
    with pytest.raises(ValueError, match=r"fit no encoder of their sizes: [\s\S]*norm\.bias"):
        PretrainedEncoder(config, missing)


def test_the_three_lines_of_the_readme(run, tmp_path):
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(encoder = ijepa\.load_pretrained.*?)```", text, re.DOTALL)
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "a.jpg")
    names = {"ijepa": ijepa, "source": run, "paths": [tmp_path / "a.jpg", tmp_path / "a.jpg"]}
    exec(code, names)
    assert names["images"].shape == (2, 3, 16, 16) and names["features"].shape == (2, 16)
