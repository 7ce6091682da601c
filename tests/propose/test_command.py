"""`ijepa pretrain --data.path FOLDER` without a recipe."""

import pytest
from small_runs import photographs

from ijepa import cli
from ijepa.data import folder_source
from ijepa.propose.choices import Choice
from ijepa.propose.command import propose
from ijepa.propose.machine import Speed, measure_speed
from ijepa.propose.recipe_file import recipe_name, recipe_text, write_beside_others
from ijepa.recipes import load_recipe, with_settings
from ijepa.train.checkpoint import load_checkpoint

# A network that takes milliseconds a step.
QUICK = [
    "--model.width", "16", "--model.depth", "1", "--model.heads", "2", "--model.predictor-width",
    "8", "--model.predictor-depth", "1", "--model.predictor-heads", "1", "--train.device", "cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.setenv("IJEPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def timed(monkeypatch):
    """Recipes that were timed, at a made-up speed of 400 images/s."""
    recipes = []

    def measure(recipe, _source):
        recipes.append(recipe)
        return Speed(step=2e-3, decode=1e-3)

    monkeypatch.setattr("ijepa.propose.command.measure_speed", measure)
    return recipes


def test_a_dry_run_prints_a_recipe_and_leaves_nothing(tmp_path, timed, capsys):
    photographs(tmp_path / "photos", 24)
    before = sorted(tmp_path.rglob("*"))
    arguments = ["pretrain", "--data.path", "photos", "--hours", "0.5", "--dry-run",
                 "--train.device=cpu"]  # fmt: skip
    assert cli.main(arguments) == 0
    assert sorted(tmp_path.rglob("*")) == before
    text = capsys.readouterr().out
    for line in text.splitlines():
        assert not line or line[0] in "#[" or "  # " in line, f"no reason: {line}"
    assert "24, the median 24x20 pixels, 2 classes" in text and "0.5 hours." in text
    (tmp_path / "mine.toml").write_text(text)
    recipe = load_recipe("mine.toml")
    assert recipe.data.path == str(tmp_path / "photos")
    assert recipe.model == timed[-1].model
    assert recipe.in_steps(24).train.num_steps * recipe.train.batch_size <= 24_000


def test_a_run_trains_by_the_recipe_that_it_wrote(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ijepa.propose.machine._SECONDS", 0.02)
    photographs(tmp_path / "my photos", 24)
    arguments = ["pretrain", "--data.path", "my photos", "--hours", "1", *QUICK,
                 "--train.steps", "3", "--data.workers", "0"]  # fmt: skip
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "Written to my-photos.toml" in shown and "step 3/3" in shown
    recipe = load_recipe("my-photos.toml")
    assert load_checkpoint("runs/my-photos-001").step == 3
    assert (recipe.model.width, recipe.train.steps, recipe.data.workers) == (16, 3, 0)
    text = (tmp_path / "my-photos.toml").read_text()
    for key in ("width = 16", "steps = 3", "workers = 0"):
        line = next(line for line in text.splitlines() if line.startswith(key))
        assert line.endswith("# as given on the command line")
    assert (tmp_path / "runs/my-photos-001/summary.md").exists()
    # The file is somebody's now: another proposal does not touch it.
    (tmp_path / "my-photos.toml").write_text(text + "# mine\n")
    assert cli.main(arguments) == 0
    assert (tmp_path / "my-photos.toml").read_text() == text + "# mine\n"
    assert load_checkpoint("runs/my-photos-2-001").step == 3


def test_lengths_follow_what_was_given_and_the_file_says_all_of_it(tmp_path, timed):
    photographs(tmp_path / "photos", 40)

    def changed(settings):
        return propose(
            "photos",
            hours=0.001,
            device="cpu",
            override=lambda recipe: with_settings(recipe, settings),
            given=list(settings),
        )

    whole = changed({}).recipe
    half = changed({"train.batch_size": whole.train.batch_size // 2}).recipe
    assert timed[-1].train.batch_size == half.train.batch_size == whole.train.batch_size // 2
    assert half.train.num_steps == pytest.approx(2 * whole.train.num_steps, abs=2)
    for settings in (
        {"schedule.warmup_epochs": 2.0},
        {"train.epochs": 3.0, "schedule.warmup_steps": 1},
        {"model.init": "released", "optim.eps": 1e-6, "masks.min_context": 3},
        {"optim.max_grad_norm": 1.0, "data.flip": True, "model.image_size": (24, 16)},
    ):
        proposal = changed(settings)
        (tmp_path / "photos.toml").write_text(proposal.text)
        assert load_recipe("photos.toml") == proposal.recipe
    proposal = changed({"train.epochs": 7.0})
    assert (proposal.recipe.train.steps, proposal.recipe.train.epochs) == (None, 7.0)
    (tmp_path / "p.toml").write_text(proposal.text)
    assert load_recipe("p.toml").train == proposal.recipe.train


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--hours", "2"], "--hours and --dry-run are for a recipe that is made for a folder"),
        (["--dry-run"], "--hours and --dry-run are for a recipe that is made for a folder"),
        (["vitb16", "--data.path", "photos", "--dry-run"], "without a recipe's name"),
        (["--data.path", "photos", "--hours", "0"], "--hours must be greater than 0"),
        (["--data.path", "photos", "--hours", "nan"], "--hours must be greater than 0"),
        (["--data.path", "photos", "--hours", "1e9"], "at most 10000, got 1000000000.0"),
        (["--data.path", "photos", "--hours", "long"], "--hours must be a number, got 'long'"),
        (["--data.path", "absent"], "no folder absent"),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, arguments, expected):
    photographs(tmp_path / "photos", 3)
    assert cli.main(["pretrain", *arguments]) == 1
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "runs").exists() and not list(tmp_path.glob("*.toml"))


def test_several_ranks_are_told_to_take_a_file(tmp_path, capsys, monkeypatch):
    photographs(tmp_path / "photos", 3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["pretrain", "--data.path", "photos"]) == 1
    assert "`ijepa pretrain --data.path photos --dry-run > my.toml`" in capsys.readouterr().err


@pytest.mark.parametrize("name", ['say "x" \\ y', "füchse 🦊", "a\tb\x7f", "#1 = [x]"])
def test_folders_of_any_name_are_written_down(tmp_path, name):
    choices = [
        Choice("data.source", "folder", "yours"),
        Choice("data.path", f"/x/{name}", "there"),
        Choice("train.steps", 3, "few"),
        Choice("model.image_mean", [0.1, 0.2, 0.3], "seen"),
        Choice("schedule.peak_lr", 1e-05, "low"),
        Choice("data.flip", True, "why"),
    ]
    path = write_beside_others(recipe_text(["head"], choices), tmp_path, recipe_name(f"/x/{name}"))
    recipe = load_recipe(str(path))
    assert recipe.data.path == f"/x/{name}" and recipe.data.flip
    assert recipe.schedule.peak_lr == 1e-5 and recipe.model.image_mean == (0.1, 0.2, 0.3)
    assert recipe.name == recipe_name(f"/x/{name}")


def test_a_name_that_is_no_text_is_refused(tmp_path, timed):
    photographs(tmp_path / "x\udcff", 3)
    with pytest.raises(ValueError, match="is no UTF-8"):
        propose("x\udcff")


def test_steps_are_really_taken(tmp_path):
    photographs(tmp_path / "photos", 8)
    source = folder_source("photos")
    recipe = load_recipe(
        "shapes-tiny",
        {"data.path": "photos", "train.batch_size": 4, "train.device": "cpu", "model.depth": 1},
    )
    speed = measure_speed(recipe, source)
    assert 1e-5 < speed.step < 5 and 1e-6 < speed.decode < 5
