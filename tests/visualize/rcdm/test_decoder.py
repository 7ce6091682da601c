"""The decoder: conditioned, trained, resumed bit by bit, sampled, refused where it is damaged."""

import sys

import pytest
import torch
from small_runs import small_recipe

from ijepa import cli
from ijepa.evaluate.pooled_predictions import pooled_prediction, pooled_targets
from ijepa.interop import load_run
from ijepa.masks.batch import MaskBatch
from ijepa.train.pretrain import pretrain
from ijepa.visualize.rcdm.presets import PRESETS, Preset

TINY = Preset(8, 32, (1, 1), (4,), 1, 32)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IJEPA_CACHE", str(folder / "cache"))
        pretrain(small_recipe(folder / "run", train__steps=2))
        yield str(folder / "run")


@pytest.fixture
def trainer():
    pytest.importorskip("diffusers", reason="RCDM's decoder needs diffusers")
    from ijepa.visualize.rcdm.decoder import Decoder
    from ijepa.visualize.rcdm.training import DecoderTrainer

    def make(about=None):
        torch.manual_seed(0)
        return DecoderTrainer(Decoder(TINY, 6), about or {"networks": "x"}, learning_rate=1e-3)

    return make


def batches(count, seed=5):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        images = torch.randint(0, 256, (4, 3, 8, 8), generator=generator).byte()
        yield images, torch.randn(4, 6, generator=generator)


def test_without_diffusers_the_command_says_what_is_missing(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setitem(PRESETS, "tiny", Preset(16, 32, (1, 1), (), 1, 32))
    assert cli.main(["visualize", "rcdm", "train", run, "--out", str(tmp_path / "d")]) == 1
    assert "pip install 'ijepa[rcdm]'" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_the_representation_decides_about_the_noise(trainer):
    decoder = trainer().decoder.eval()
    noisy, steps = torch.randn(2, 3, 8, 8), torch.tensor([5, 500])
    given = torch.randn(2, 6)
    out = decoder(noisy, steps, given)
    assert out.shape == (2, 6, 8, 8)
    changed = given.clone()
    changed[1] += 1
    other = decoder(noisy, steps, changed)
    torch.testing.assert_close(other[0], out[0])
    assert (other[1] - out[1]).abs().max() > 1e-5


def test_representations_are_standardised(trainer):
    decoder = trainer().decoder
    rows = torch.randn(50, 6) * torch.arange(1, 7) + 10
    decoder.standardise(rows)
    torch.testing.assert_close(decoder.mean, rows.mean(dim=0))
    torch.testing.assert_close(decoder.std, rows.std(dim=0))


def test_a_resumed_decoder_is_the_same_bit_by_bit(trainer, tmp_path):
    def never():
        return False

    whole, first = trainer(), trainer()
    whole.train(batches(6), folder=tmp_path / "a", save_every=100, told=lambda *_: None, stop=never)
    half = list(batches(6))
    first.train(half[:3], folder=tmp_path / "b", save_every=100, told=lambda *_: None, stop=never)
    second = trainer()
    second.go_on(tmp_path / "b")
    assert second.step == 3
    second.decoder.train()
    second.train(half[3:], folder=tmp_path / "b", save_every=100, told=lambda *_: None, stop=never)
    for mine, theirs in ((second.average, whole.average),
                         (second.decoder.state_dict(), whole.decoder.state_dict())):  # fmt: skip
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_the_loss_falls_and_the_average_follows(trainer, tmp_path):
    training = trainer()
    images, given = next(batches(1))
    training.decoder.train()
    losses = [training.train_step(images, given) for _ in range(60)]
    assert sum(losses[-15:]) < 0.8 * sum(losses[:15])
    for name, parameter in training.decoder.named_parameters():
        assert (training.average[name] - parameter).abs().max() < 0.1


def test_a_step_that_is_not_finite_changes_nothing(trainer):
    training = trainer()
    before = {name: tensor.clone() for name, tensor in training.decoder.state_dict().items()}
    images, given = next(batches(1))
    with pytest.raises(FloatingPointError, match="at step 1"):
        training.train_step(images, given * float("nan"))
    after = training.decoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before) and training.step == 0


def test_damaged_and_foreign_decoders_are_refused(trainer, tmp_path):
    from ijepa.visualize.rcdm.training import FILE_NAME, load_decoder

    with pytest.raises(FileNotFoundError, match="holds no decoder"):
        load_decoder(tmp_path)
    training = trainer()
    training.save(tmp_path)
    with pytest.raises(ValueError, match="a decoder of networks x, not y"):
        trainer({"networks": "y"}).go_on(tmp_path)
    whole = (tmp_path / FILE_NAME).read_bytes()
    (tmp_path / FILE_NAME).write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        load_decoder(tmp_path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / FILE_NAME)
    with pytest.raises(ValueError, match="is no decoder's"):
        load_decoder(tmp_path)


def test_pooled_predictions_are_means_over_the_first_block(run):
    model = load_run(run).eval()
    images = torch.randint(0, 256, (2, 3, 16, 16)).byte()
    masks = MaskBatch.from_lists(
        [[0, 1, 2], [5]], [[[7, 8], [9, 10, 11]], [[12], [13, 14]]], grid=(4, 4)
    )
    predictions = model.predict(images, masks)[masks.targets >= 0]
    found = pooled_prediction(model, images, masks)
    torch.testing.assert_close(found[0], predictions[:2].mean(dim=0))
    torch.testing.assert_close(found[1], predictions[5])
    torch.testing.assert_close(
        pooled_targets(model, images), model.target_encoder(images).mean(dim=1)
    )


@pytest.mark.parametrize("of", ["encoder", "predictor"])
def test_a_decoder_from_the_command_line(run, tmp_path, of, monkeypatch, capsys):
    pytest.importorskip("diffusers", reason="RCDM's decoder needs diffusers")
    monkeypatch.setitem(PRESETS, "tiny", Preset(16, 32, (1, 1), (), 1, 32))
    out = str(tmp_path / "decoder")
    train = ["visualize", "rcdm", "train", run, "--out", out, "--of", of, "--batch-size", "4"]
    assert cli.main([*train, "--steps", "2"]) == 0
    assert cli.main([*train, "--steps", "3"]) == 0
    assert "after step 2" in capsys.readouterr().out
    sample = ["visualize", "rcdm", "sample", out, "--out", str(tmp_path / "pictures"), "--steps",
              "2", "--count", "2", "--samples", "2", "--score", "5"]  # fmt: skip
    assert cli.main(sample) == 0
    told = capsys.readouterr().out
    assert (tmp_path / "pictures" / f"rcdm-{of}.png").exists()
    assert "shape by a linear classifier on pixels" in told and "of 5 samples" in told
    other = ["--steps", "4", "--random-network"]
    assert cli.main([*train, *other]) == 1
    assert "choose another --out" in capsys.readouterr().err


def test_an_image_too_small_for_the_preset_is_refused(run, tmp_path, capsys):
    arguments = ["train", run, "--out", str(tmp_path / "d"), "--preset", "compact"]
    assert cli.main(["visualize", "rcdm", *arguments]) == 1
    assert "choose a smaller --preset" in capsys.readouterr().err
