"""Released checkpoints: what is read off the tensors, and what is refused by name."""

from pathlib import Path

import pytest
import torch
from small_runs import small_recipe

from ijepa import IJEPA, VIT_SIZES, ModelConfig, load_official, load_run
from ijepa.train.checkpoint import CheckpointError, load_checkpoint
from ijepa.train.pretrain import pretrain

RELEASED = Path(__file__).parent / "golden" / "tiny_a.pth.tar"


@pytest.fixture
def checkpoint():
    return torch.load(RELEASED, weights_only=True)


def saved(checkpoint, folder):
    path = folder / "changed.pth.tar"
    torch.save(checkpoint, path)
    return path


def test_sizes_are_read_off_the_tensors(checkpoint):
    model = load_official(RELEASED, num_heads=4)
    config = model.config
    assert config.image_size == (64, 64) and config.patch_size == (8, 8) and config.channels == 3
    assert (config.width, config.depth, config.heads, config.mlp_ratio) == (64, 3, 4, 4.0)
    assert (config.predictor_width, config.predictor_depth, config.predictor_heads) == (32, 2, 4)
    ours = {"encoder": "context_encoder", "predictor": "predictor"}
    for name in ("encoder", "predictor", "target_encoder"):
        network = model.get_submodule(ours.get(name, name))
        for key, value in network.state_dict().items():
            assert torch.equal(value, checkpoint[name][f"module.{key}"])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name for name in frozen if not name.startswith("target_encoder")} == {
        "context_encoder.pos_embed",
        "predictor.predictor_pos_embed",
    }


def test_a_released_encoder_takes_images_as_decoded():
    """Once the statistics of pixels stayed on the meta device."""
    model = load_official(RELEASED, num_heads=4)
    statistics = model.config.image_mean, model.config.image_std
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in statistics)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    features = model.target_encoder((images / 255 - mean) / std)
    torch.testing.assert_close(model.target_encoder(images), features)


def test_heads_follow_from_a_known_width_only(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="no ViT of width 64 is known, give num_heads"):
        load_official(RELEASED)
    with pytest.raises(ValueError, match="encoder width 64 has no 7 heads"):
        load_official(RELEASED, num_heads=7)
    sizes = VIT_SIZES["T"] | {"depth": 1}
    config = ModelConfig(image_size=(32, 32), predictor_depth=1, predictor_heads=3, **sizes)
    model = IJEPA(config)
    networks = {
        "encoder": model.context_encoder,
        "predictor": model.predictor,
        "target_encoder": model.target_encoder,
    }
    states = {name: network.state_dict() for name, network in networks.items()}
    assert load_official(saved(states, tmp_path)).config == config  # without `module.` too


def test_every_mismatch_is_named(checkpoint, tmp_path):
    del checkpoint["encoder"]["module.blocks.1.norm1.bias"]
    checkpoint["predictor"]["module.extra"] = torch.zeros(2)
    checkpoint["target_encoder"]["module.norm.weight"] = torch.zeros(63)
    with pytest.raises(ValueError) as error:
        load_official(saved(checkpoint, tmp_path), num_heads=4)
    text = str(error.value)
    assert "encoder.blocks.1.norm1.bias is missing" in text
    assert "predictor.extra is unknown" in text
    assert "target_encoder.norm.weight must have shape (64,), got (63,)" in text


def test_a_network_is_missing(checkpoint, tmp_path):
    del checkpoint["target_encoder"]
    with pytest.raises(ValueError, match=r"lacks target_encoder .it holds encoder, predictor"):
        load_official(saved(checkpoint, tmp_path), num_heads=4)


@pytest.mark.parametrize(
    ("network", "name"),
    [
        ("encoder", "patch_embed.proj.weight"),
        ("encoder", "pos_embed"),
        ("predictor", "predictor_embed.weight"),
    ],
)
def test_a_tensor_that_tells_the_sizes_is_missing(checkpoint, tmp_path, network, name):
    del checkpoint[network][f"module.{name}"]
    with pytest.raises(ValueError, match=f"{network}.{name} with . dimensions is missing"):
        load_official(saved(checkpoint, tmp_path), num_heads=4)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    whole = RELEASED.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 100):
        path = tmp_path / f"cut-{length}.pth.tar"
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"cut-{length}.pth.tar is damaged or no PyTorch"):
            load_official(path, num_heads=4)
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"\xff\xd8\xff\xe0 not a checkpoint" * 9)
    with pytest.raises(ValueError, match=r"photo.jpg is damaged or no PyTorch"):
        load_official(path)
    with pytest.raises(ValueError, match="is no released I-JEPA checkpoint: it holds a list"):
        load_official(saved([1, 2], tmp_path))
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_official(tmp_path / "none.pth.tar")


class Payload:
    """Unpickled by anything but `weights_only=True`, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_not_run(checkpoint, tmp_path):
    trace = tmp_path / "ran"
    with pytest.raises(ValueError, match="is damaged or no PyTorch"):
        load_official(saved(checkpoint | {"opt": Payload(trace)}, tmp_path), num_heads=4)
    assert not trace.exists()


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("IJEPA_CACHE", str(tmp_path / "cache"))
    pretrain(small_recipe(tmp_path / "run", train__steps=2))
    return tmp_path / "run"


def test_a_run_is_opened_by_its_folder_or_a_checkpoint(run):
    checkpoint = load_checkpoint(run)
    for path in (run, str(run), checkpoint.path):
        model = load_run(path)
        state = model.state_dict()
        assert set(state) == set(checkpoint.weights)
        assert all(torch.equal(state[name], value) for name, value in checkpoint.weights.items())
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (model.config.image_mean, model.config.image_std)
    )
    features = model.target_encoder(images)
    torch.testing.assert_close(model.target_encoder((images / 255 - mean) / std), features)
    assert features.shape == (2, 16, 16)
    with pytest.raises(CheckpointError, match="holds no checkpoints"):
        load_run(run.parent)


def test_a_run_is_no_released_checkpoint_and_what_opens_it_is_said(run, tmp_path):
    folder = load_checkpoint(run).path
    for path, opened in ((run, run), (folder, folder), (folder / "weights.safetensors", folder)):
        with pytest.raises(ValueError, match="is a checkpoint of this program") as error:
            load_official(path)
        assert str(error.value).endswith(f"ijepa.load_run({str(opened)!r}) opens it")
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((folder / "weights.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"without their settings.*ijepa\.load_run") as error:
        load_official(alone)
    assert "blocks.0" not in str(error.value)
    with pytest.raises(ValueError, match="is a folder: give the"):
        load_official(tmp_path)


def test_of_a_foreign_file_a_few_names_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"it holds layer0, .*layer7, \.\.\. \(50\)\)") as error:
        load_official(saved({f"layer{n}": torch.zeros(1) for n in range(50)}, tmp_path))
    assert "layer8" not in str(error.value)
