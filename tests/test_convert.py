"""Encoders in other programs' forms: round trips bit by bit, parity with transformers and ONNX."""

import importlib.util
import json

import pytest
import torch
from small_runs import small_recipe

from ijepa import IJEPA, ModelConfig, load_official, load_pretrained
from ijepa.cli import main
from ijepa.interop.convert import convert, model_name
from ijepa.interop.flat import expected_shapes
from ijepa.interop.released import write_released
from ijepa.train.pretrain import pretrain

SMALL = ModelConfig(
    image_size=(32, 48), patch_size=(8, 8), width=64, depth=2, heads=4, mlp_ratio=3.0,
    predictor_width=32, predictor_depth=1, predictor_heads=4,
)  # fmt: skip
SQUARE = ModelConfig(
    image_size=(32, 32), patch_size=(8, 8), width=64, depth=2, heads=4,
    predictor_width=32, predictor_depth=1, predictor_heads=4,
)  # fmt: skip
ENCODERS = ("timm", "transformers", "safetensors")
SUFFIX = {"released": ".pth.tar", "timm": ".pth", "safetensors": ".safetensors", "onnx": ".onnx"}


def randomised(config: ModelConfig) -> IJEPA:
    """Networks no two of whose tensors are alike, biases and norms neither."""
    model = IJEPA(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("pos_embed"):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture
def released(tmp_path):
    model = randomised(SQUARE)
    path = tmp_path / "model.pth.tar"
    write_released(path, model)
    return path, model


def encoder_state(source, **options):
    return load_pretrained(source, num_heads=4, **options).state_dict()


@pytest.mark.parametrize("network", ["target_encoder", "context_encoder"])
@pytest.mark.parametrize("form", ENCODERS)
def test_round_trips_are_bit_equal(form, network, released, tmp_path):
    source, model = released
    out = tmp_path / f"out{SUFFIX.get(form, '')}"
    convert(source, out, form, network=network, num_heads=4)
    expected = model.get_submodule(network).state_dict()
    found = encoder_state(out)
    assert found.keys() == expected.keys() == expected_shapes(SQUARE).keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for other in ENCODERS:  # and from there into every other form
        again = tmp_path / f"again-{other}{SUFFIX.get(other, '')}"
        convert(out, again, other, num_heads=4)
        assert all(torch.equal(x, expected[name]) for name, x in encoder_state(again).items())


def test_all_three_networks_come_back(released, tmp_path):
    source, model = released
    convert(source, tmp_path / "again.pth.tar", "released", num_heads=4)
    again = load_official(tmp_path / "again.pth.tar", num_heads=4)
    assert again.config == load_official(source, num_heads=4).config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_run_is_converted(tmp_path, capsys):
    sizes = {"model__predictor_width": 16, "model__predictor_heads": 2}  # heads are alike there
    run = pretrain(small_recipe(tmp_path / "run", train__steps=2, **sizes)).folder
    encoder = load_pretrained(run)
    for form in ("released", "transformers", "safetensors"):
        out = tmp_path / f"out-{form}{SUFFIX.get(form, '')}"
        assert main(["convert", str(run), str(out), "--to", form]) == 0
        told = capsys.readouterr().out
        assert f"for {form}. Read it with" in told and str(out) in told
        heads = None if form != "released" else encoder.config.heads
        found = load_pretrained(out, num_heads=heads)
        assert all(
            torch.equal(found.state_dict()[name], tensor)
            for name, tensor in encoder.state_dict().items()
        )
        if form != "released":  # which says nothing of pixels
            assert found.config.image_mean == encoder.config.image_mean


def test_a_self_described_file_says_heads_grid_and_statistics(tmp_path):
    write_released(tmp_path / "square.pth.tar", randomised(SQUARE))
    convert(tmp_path / "square.pth.tar", tmp_path / "a.safetensors", "safetensors", num_heads=4)
    assert load_pretrained(tmp_path / "a.safetensors").config.heads == 4
    with pytest.raises(ValueError, match="says that it has 4 heads, not 8"):
        load_pretrained(tmp_path / "a.safetensors", num_heads=8)


def test_every_tensor_that_does_not_fit_is_named(released, tmp_path):
    _, model = released
    state = dict(model.target_encoder.state_dict())
    del state["blocks.1.norm2.bias"]
    state["cls_token"] = torch.zeros(1, 1, 64)
    state["norm.weight"] = torch.zeros(65)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(ValueError) as error:
        load_pretrained(tmp_path / "odd.pth", num_heads=4)
    for line in ("blocks.1.norm2.bias is missing", "cls_token is unknown",
                 "norm.weight must have shape (64,), got (65,)"):  # fmt: skip
        assert line in str(error.value)


def test_what_cannot_be_converted_is_refused(released, tmp_path):
    source, _ = released
    folder = tmp_path / "folder"
    convert(source, folder, "transformers", num_heads=4)
    with pytest.raises(FileExistsError, match="there is something at"):
        convert(source, folder, "transformers", num_heads=4)
    with pytest.raises(ValueError, match="holds one encoder, and a released checkpoint has three"):
        convert(folder, tmp_path / "a.pth.tar", "released")
    with pytest.raises(ValueError, match=r"a file of onnx ends in \.onnx, got 'a\.pth'"):
        convert(folder, tmp_path / "a.pth", "onnx")
    with pytest.raises(ValueError, match="to must be one of transformers, released"):
        convert(folder, tmp_path / "a.pth", "keras")
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"model_type": "vit"}))
    with pytest.raises(ValueError, match="holds a 'vit' of transformers, not an 'ijepa'"):
        load_pretrained(folder)


def test_an_index_names_no_file_outside_its_folder(released, tmp_path):
    source, _ = released
    folder = tmp_path / "folder"
    convert(source, folder, "transformers", num_heads=4)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"layernorm.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names '\.\./outside\.safetensors', which is not in"):
        load_pretrained(folder)
    (tmp_path / "outside.safetensors").rename(folder / "part-1.safetensors")
    index = {"weight_map": {"layernorm.weight": "part-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_pretrained(folder).config.depth == 2


def test_a_conversion_that_fails_leaves_nothing(released, tmp_path, monkeypatch):
    source, _ = released
    from ijepa.interop import transformers_folder

    def fails(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr(transformers_folder, "save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        convert(source, tmp_path / "out", "transformers", num_heads=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pth.tar"]


def test_the_fields_names():
    from ijepa import VIT_SIZES

    huge = ModelConfig(**VIT_SIZES["H"], patch_size=(14, 14), predictor_heads=16)
    assert model_name(huge) == "ViT-H/14 at 224x224"
    at_448 = ModelConfig(**VIT_SIZES["H"], image_size=(448, 448), predictor_heads=16)
    assert model_name(at_448) == "ViT-H/16 at 448x448"
    assert model_name(SQUARE).startswith("width 64, depth 2, 4 heads")


# ----------------------------------------------------------------------------- the real peers


def hugging_face_model(config: ModelConfig):
    transformers = pytest.importorskip("transformers")
    settings = transformers.IJepaConfig(
        hidden_size=config.width, num_hidden_layers=config.depth,
        num_attention_heads=config.heads, image_size=list(config.image_size),
        intermediate_size=round(config.width * config.mlp_ratio),
        patch_size=config.patch_size[0], layer_norm_eps=1e-6,
    )  # fmt: skip
    model = transformers.IJepaModel(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("config", [SQUARE, SMALL], ids=["square", "wide"])
def test_transformers_reads_what_we_write(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = randomised(config)
    from ijepa.interop.transformers_folder import write_transformers

    write_transformers(tmp_path / "out", config, model.target_encoder.state_dict())
    theirs, told = transformers.IJepaModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images = torch.randint(0, 256, (3, 3, *config.image_size), dtype=torch.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    pixels = processor(list(images.permute(0, 2, 3, 1).numpy()), return_tensors="pt")
    with torch.no_grad():
        expected = model.target_encoder(images)
        found = theirs.eval()(**pixels).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [SQUARE, SMALL], ids=["square", "wide"])
def test_we_read_what_transformers_writes(config, tmp_path):
    theirs = hugging_face_model(config)
    theirs.save_pretrained(tmp_path / "theirs")
    encoder = load_pretrained(tmp_path / "theirs")
    assert encoder.config.image_size == config.image_size
    pixels = torch.randn(3, 3, *config.image_size)
    with torch.no_grad():
        expected = theirs(pixels).last_hidden_state
        torch.testing.assert_close(encoder(pixels), expected, atol=1e-5, rtol=1e-5)


def test_a_classifiers_encoder_is_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    settings = hugging_face_model(SQUARE).config
    classifier = transformers.IJepaForImageClassification(settings).eval()
    classifier.save_pretrained(tmp_path / "theirs")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = classifier.ijepa(pixels).last_hidden_state
        found = load_pretrained(tmp_path / "theirs")(pixels)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_other_eps_and_their_converters_statistics_are_told(tmp_path):
    theirs = hugging_face_model(SQUARE)
    theirs.config.layer_norm_eps = 1e-12
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs/preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    with pytest.warns(UserWarning) as told:
        load_pretrained(tmp_path / "theirs")
    texts = [str(warning.message) for warning in told]
    assert any("layer_norm_eps = 1e-12" in text for text in texts)
    assert any("image_mean = 0.5" in text for text in texts)


# What timm's `vit_*` without a class token holds, by its documentation: `VisionTransformer` with
# class_token=False, global_pool="avg", fc_norm=False, num_classes=0.
TIMM_BLOCK = [
    f"{layer}.{kind}"
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
]


def test_timms_key_list():
    keys = ["pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    keys += [f"blocks.{block}.{name}" for block in range(2) for name in TIMM_BLOCK]
    assert sorted(expected_shapes(SQUARE)) == sorted([*keys, "norm.weight", "norm.bias"])


def test_timm_takes_it_strictly(released, tmp_path):
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("timm does not import without a torchvision that fits the torch: its key list "
                    "is held to its documentation above")  # fmt: skip
    timm = pytest.importorskip("timm")
    source, model = released
    convert(source, tmp_path / "out.pth", "timm", num_heads=4)
    theirs = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, class_token=False,
        global_pool="avg", fc_norm=False, num_classes=0,
    ).eval()  # fmt: skip
    theirs.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True), strict=True)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs.forward_features(pixels), model.target_encoder(pixels), atol=1e-5, rtol=1e-5
        )


def test_onnx_agrees_at_any_batch(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from ijepa.interop.onnx_file import write_onnx

    model = randomised(SMALL)
    write_onnx(tmp_path / "out.onnx", SMALL, model.target_encoder.state_dict())
    session = runtime.InferenceSession(str(tmp_path / "out.onnx"))
    for batch in (1, 2, 5):
        images = torch.randint(0, 256, (batch, 3, *SMALL.image_size), dtype=torch.uint8)
        (found,) = session.run(["features"], {"images": images.numpy()})
        with torch.no_grad():
            expected = model.target_encoder(images)
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)


def test_onnx_says_what_it_needs(monkeypatch, tmp_path):
    from ijepa.interop import onnx_file

    monkeypatch.setattr(onnx_file.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"need onnx and onnxscript: pip install 'ijepa\[interop"):
        onnx_file.write_onnx(tmp_path / "out.onnx", SQUARE, {})
