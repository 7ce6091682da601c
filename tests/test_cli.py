"""The command line: what it refuses before any data is touched, and what it prints."""

import subprocess
import sys

import pytest
import torch
from PIL import Image
from small_runs import SETTINGS, small_arguments, small_recipe

from ijepa import cli
from ijepa.config import Recipe, TrainConfig
from ijepa.train.checkpoint import load_checkpoint
from ijepa.train.pretrain import Outcome, pretrain


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IJEPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def started(monkeypatch):
    """Recipes that `ijepa pretrain` would have run."""
    recipes = []

    def record(recipe, **_others):
        recipes.append(recipe)
        return Outcome("runs/x", finished=False)

    monkeypatch.setattr("ijepa.train.pretrain.pretrain", record)
    return recipes


def test_a_batch_that_the_ranks_cannot_share():
    recipe = Recipe(train=TrainConfig(batch_size=64, accumulate=2))
    with pytest.raises(ValueError, match="3 ranks x 2 micro-batches: the nearest that can is 66"):
        recipe.micro_batch_size(3)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pretrain", "--train.batchsize", "3"], ["'train.batchsize'", "'train.batch_size'"]),
        (["pretrain", "vitb61"], ["unknown recipe 'vitb61'", "did you mean 'vitb16'"]),
        (["pretrain", "--trains.steps=3"], ["unknown setting", "did you mean 'train.steps'"]),
        (["pretrain", "absent.toml"], ["no recipe file absent.toml; recipes by name: ", "vith14"]),
        (["pretrain", "--resume", "nowhere"], ["nowhere holds no checkpoints: give the"]),
        (["pretrain", "--resume"], ["--resume needs a run's folder"]),
        (["pretrain", "vitb16"], ["add --data.path FOLDER"]),
        (["pretrain", "--train.batch-size", "7", "--train.accumulate", "7",
          "--masks.min-context", "60"], ["min_context"]),
        (["pretrian"], ["unknown command 'pretrian'", "did you mean 'pretrain'"]),
        (["pretrain", ""], [" is a folder, not a recipe"]),
        (["pretrain", "--resume", "a", "--resume=b"], ["--resume is given twice"]),
        (["plan", "vitb16", "--gpus", "1e3"], ["--gpus must be a whole number, got '1e3'"]),
        (["plan", "vitb16", "--num-images", "-5"], ["num_images must be at least 1, got -5"]),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_any_data_is_touched(arguments, expected, tmp_path, capsys):
    assert cli.main(arguments) == 1
    message = capsys.readouterr().err
    for part in expected:
        assert part in message
    assert not (tmp_path / "cache").exists() and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.loss", "l1"], ["l1", "smooth_l1", "l2"]),
        (["--train.steps", "many"], ["--train.steps", "many"]),
        (["--model.width", "98"], ["width must be a multiple of 4, got 98"]),
        (["--data.path", "x", "--data.source", "shapes"], ["path = 'x' needs data.source"]),
    ],
)
def test_bad_values_are_explained(arguments, expected, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["pretrain", *arguments])
    assert stopped.value.code == 2
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    for part in expected:
        assert part in message
    assert not (tmp_path / "cache").exists()


def test_overrides_reach_the_recipe(started):
    cli.main(["pretrain"])
    cli.main(["pretrain", "vitb16-paper", "--train.steps=9", "--data.path", "/x", "--data.flip"])
    cli.main(["pretrain", "shapes-tiny", "--train.epochs", "2", "--masks.target-scale", ".1", ".2",
              "--data.source", "folder", "--monitor.no-evaluate"])  # fmt: skip
    default, paper, tiny = started
    assert default.name == "shapes-tiny"
    assert (paper.train.steps, paper.train.epochs, paper.model.loss) == (9, None, "l2")
    assert (paper.data.path, paper.data.flip) == ("/x", True)
    assert (tiny.train.steps, tiny.train.epochs) == (None, 2.0)
    assert (tiny.masks.target_scale, tiny.data.source) == ((0.1, 0.2), "folder")
    assert not tiny.monitor.evaluate


def test_the_small_arguments_of_the_tests_mean_what_they_say(started):
    cli.main(["pretrain", *small_arguments("out", data__workers=2)])
    assert started[0] == small_recipe("out", data__workers=2)
    assert len(SETTINGS) > 10


def test_a_stopped_run_prints_how_to_go_on(started, capsys):
    assert cli.main(["pretrain"]) == 0
    assert "ijepa pretrain --resume runs/x" in capsys.readouterr().out


def test_resume_takes_the_runs_settings_and_few_others(started, tmp_path):
    run = tmp_path / "run"
    pretrain(small_recipe(run, train__steps=2))
    assert cli.main(["pretrain", "--resume", str(run), "--data.workers=3"]) == 0
    recipe = started[-1]
    assert recipe.data.workers == 3
    assert recipe.model == small_recipe(run).model and recipe.train.steps == 2


def test_a_resumed_run_stays_the_same_run(tmp_path, capsys):
    run = tmp_path / "run"
    recipe = small_recipe(run, train__steps=2)
    pretrain(recipe)
    for arguments, expected in (
        (["--train.seed", "2"], f"train.seed is {recipe.train.seed} in the run"),
        (["--model.depth", "3"], "model.depth is 2 in the run"),
        (["vitb16"], "is a run of recipe shapes-tiny, not of vitb16"),
    ):
        assert cli.main(["pretrain", *arguments, "--resume", str(run)]) == 1
        assert expected in capsys.readouterr().err
    assert load_checkpoint(run).step == 2


def test_a_run_ends_with_its_table_and_its_files(tmp_path, capsys):
    arguments = small_arguments("run", train__steps=3, monitor__every=3, monitor__evaluate=True)
    torch.manual_seed(0)
    assert cli.main(["pretrain", *arguments]) == 0
    shown = capsys.readouterr().out
    for part in ("step 3/3", "effective rank", "pretrained, last 4 blocks", "random network",
                 "raw pixels", "always the commonest class"):  # fmt: skip
        assert part in shown
    summary = (tmp_path / "run" / "summary.md").read_text()
    assert "| pretrained, last block |" in summary and "step 3" in summary
    for name in ("metrics.jsonl", "masks.png", "recipe.json", "checkpoints"):
        assert (tmp_path / "run" / name).exists()
    assert cli.main(["pretrain", *arguments]) == 1
    assert "holds a run already" in capsys.readouterr().err


def test_doctor_and_help(capsys):
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for part in ("torch", torch.__version__, "varlen_attention", "CPU tensors"):
        assert part in shown
    assert cli.main([]) == 0
    assert "shapes-tiny" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        cli.main(["pretrain", "scenes-small", "--help"])
    assert stopped.value.code == 0
    assert "--train.batch-size" in capsys.readouterr().out


def test_a_bad_setting_is_refused_without_loading_torch():
    script = (
        "import sys; from ijepa import cli; code = cli.main(['pretrain', '--train.stepz', '3']); "
        "sys.exit(10 * code + ('torch' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 10


def test_a_folder_of_ones_own(tmp_path, capsys):
    for number in range(20):
        folder = tmp_path / "photos" / ("bright" if number % 2 else "dark")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256 if number % 2 else 40, (18 + number, 25, 3))
        Image.fromarray(pixels.byte().numpy()).save(folder / f"{number}.png")
    (tmp_path / "photos" / "dark" / "broken.png").write_bytes(b"not an image")
    settings = {"data__source": "folder", "data__path": str(tmp_path / "photos")}
    # three steps of seven: all of the 21 files are met
    arguments = small_arguments(
        "run", train__steps=3, train__batch_size=7, monitor__evaluate=True, **settings
    )
    assert cli.main(["pretrain", *arguments]) == 0
    summary = (tmp_path / "run" / "summary.md").read_text()
    assert "held-out images (class)" in summary
    assert "broken.png" in summary.split("## Incidents")[1]
    assert "raw pixels" in capsys.readouterr().out
