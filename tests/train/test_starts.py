"""How runs start: what is refused at once and in words, what is told meanwhile, what is left."""

import shutil
import sys
import time

import pytest
from small_runs import photographs, small_arguments, small_recipe

import ijepa
from ijepa import cli
from ijepa.disk import NotWritten
from ijepa.recipes import load_recipe
from ijepa.report.metrics import read_metrics
from ijepa.train import from_recipe
from ijepa.train.checkpoint import load_checkpoint
from ijepa.train.panel import RunPanel
from ijepa.train.pretrain import Outcome, pretrain
from ijepa.train.trainer import Trainer


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path_factory, tmp_path, monkeypatch):
    """A cache of rendered images that all of these runs share, and a working folder of its own."""
    monkeypatch.setenv("IJEPA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def started(monkeypatch):
    """Recipes that `ijepa pretrain` would have run."""
    recipes = []

    def record(recipe, **_others):
        recipes.append(recipe)
        return Outcome("runs/x", finished=True)

    monkeypatch.setattr("ijepa.train.pretrain.pretrain", record)
    return recipes


# Refused in words.


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--train.epochs", "1e308"], "epochs must lie in"),
        (["--schedule.stretch", "inf"], "stretch must lie in"),
        (["--schedule.warmup-epochs", "1e308"], "warmup_epochs must lie in"),
        (["--model.mlp-ratio", "1e308"], "mlp_ratio must lie in"),
        (["--model.depth", "1" + "0" * 400], "depth must lie in"),
        (["--train.steps", "1" + "0" * 400], "steps must lie in"),
    ],
)
def test_numbers_beyond_sense_are_refused(arguments, expected, capsys, started):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["pretrain", *arguments])
    assert stopped.value.code == 2 and not started
    assert expected in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_whole_number_beyond_any_float_is_refused(tmp_path, capsys):
    (tmp_path / "big.toml").write_text(f"[train]\nepochs = 1{'0' * 400}\n")
    assert cli.main(["pretrain", "big.toml"]) == 1
    assert "big.toml: train.epochs is beyond any float" in capsys.readouterr().err


@pytest.mark.parametrize("base", [False, True])
def test_a_table_that_is_a_number_is_refused_by_name(tmp_path, capsys, base):
    (tmp_path / "bad.toml").write_text("train = 5\n")
    (tmp_path / "more.toml").write_text('base = "bad.toml"\n[train]\nsteps = 3\n')
    name = "more.toml" if base else "bad.toml"
    assert cli.main(["pretrain", name, "--train.steps", "3"]) == 1
    assert "bad.toml: train must be a table, got 5" in capsys.readouterr().err


def test_more_images_a_batch_than_there_are_names_what_fits(tmp_path, capsys):
    photographs(tmp_path / "photos", 12)
    assert cli.main(["pretrain", "vitb16", "--data.path", "photos", "--train.device", "cpu"]) == 1
    message = capsys.readouterr().err
    assert "train.batch_size 2048 exceeds the 12 images" in message
    assert "give --train.batch-size 8 or less" in message  # eight micro-batches
    assert "shapes-tiny" in message
    assert not (tmp_path / "runs").exists()
    with pytest.raises(
        ValueError, match=r"--train\.batch-size 5 or less with --train\.accumulate 1"
    ):
        load_recipe("vitb16").in_steps(5)


def test_without_a_length_nothing_is_rendered(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("IJEPA_CACHE", str(tmp_path / "empty"))
    (tmp_path / "mine.toml").write_text("[model]\nimage_size = [32, 32]\npatch_size = [4, 4]\n")
    assert cli.main(["pretrain", "mine.toml"]) == 1
    assert "the length of the run is not set" in capsys.readouterr().err
    assert not (tmp_path / "empty").exists() and not (tmp_path / "runs").exists()


def test_a_path_is_that_of_a_folder(tmp_path, started):
    (tmp_path / "mine.toml").write_text('[data]\npath = "photos"\n[train]\nsteps = 3\n')
    (tmp_path / "more.toml").write_text('base = "shapes-tiny"\n[data]\npath = "photos"\n')
    cli.main(["pretrain", "shapes-tiny", "--data.path", "photos"])
    cli.main(["pretrain", "mine.toml"])
    cli.main(["pretrain", "more.toml"])
    for recipe in (*started, load_recipe("shapes-tiny", {"data.path": "photos"})):
        assert (recipe.data.source, recipe.data.path) == ("folder", "photos")
    assert len(started) == 3


# Asked for.


def test_every_command_has_help_and_there_is_a_version(capsys):
    for arguments, expected in (
        (["plan", "--help"], "--num-images N"),
        (["plan", "vitb16", "--help"], "h200"),
        (["plan", "-h"], "vith14"),
        (["doctor", "--help"], "takes no arguments"),
        (["--version"], f"ijepa {ijepa.__version__}"),
    ):
        assert cli.main(arguments) == 0
        captured = capsys.readouterr()
        assert expected in captured.out and not captured.err


def test_every_setting_has_help(capsys):
    """tyro takes it from the docstrings, where one line must name one setting."""
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "decay of Adam's averages" in shown and "added to the root" in shown


def test_a_plan_for_ranks_that_cannot_share_the_batch_is_refused(capsys):
    assert cli.main(["plan", "vitb16", "--gpus", "3"]) == 1
    assert "cannot be shared among 3 ranks x 8 micro-batches" in capsys.readouterr().err
    assert cli.main(["plan", "vitb16", "--gpus", "4"]) == 0


def test_a_run_goes_on_for_more_epochs(tmp_path, capsys):
    """32 images in batches of 6: five steps an epoch."""
    pretrain(small_recipe("run"))
    assert cli.main(["pretrain", "--resume", "run", "--train.epochs", "3"]) == 0
    assert load_checkpoint(tmp_path / "run").step == 15
    assert cli.main(["pretrain", "--resume", "run", "--train.epochs", "1"]) == 1
    assert "beyond train.steps 5" in capsys.readouterr().err


# Told meanwhile.


def test_a_slow_start_says_what_it_does(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ijepa.report.progress.SECONDS_UNTOLD", 0.05)
    for owner, name in ((Trainer, "step"), (RunPanel, "images"), (from_recipe, "_build")):
        monkeypatch.setattr(owner, name, _slowed(getattr(owner, name)))
    settings = photographs(tmp_path / "photos", 12) | {"monitor__every": 10, "train__steps": 3}
    assert cli.main(["pretrain", *small_arguments("run", **settings)]) == 0
    shown = capsys.readouterr().out
    told = ("Looking for images in ", "12 images in ", "Panel on 16 images ...",
            "First step, of 6 images ...", "step 1/3")  # fmt: skip
    places = [shown.find(line) for line in told]
    assert -1 not in places and places == sorted(places), shown
    assert shown.count("First step") == 1


def _slowed(function):
    def slow(*arguments, **options):
        time.sleep(0.3)
        return function(*arguments, **options)

    return slow


# Left behind.


def broken_photographs(folder, count):
    settings = photographs(folder, count)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"not an image")
    return settings


@pytest.mark.parametrize("output", [None, "new", "there"])
def test_a_failed_start_leaves_no_folder(tmp_path, capsys, output):
    """Not one image can be read, which the first panel finds out."""
    settings = broken_photographs(tmp_path / "photos", 8)
    (tmp_path / "there").mkdir()
    arguments = small_arguments(output or "x", **settings, monitor__every=3)
    if output is None:
        place = arguments.index("--train.output")
        del arguments[place : place + 2]
    assert cli.main(["pretrain", *arguments]) == 1
    assert "most of this data set is damaged" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*")) and not (tmp_path / "new").exists()
    assert not list((tmp_path / "there").iterdir())


def test_a_start_without_tensorboard_leaves_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    arguments = small_arguments("run", train__tensorboard=True)
    assert cli.main(["pretrain", *arguments]) == 1
    assert "pip install 'ijepa[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_deleted_run_folder_comes_back_whole(tmp_path, monkeypatch, capsys):
    step = Trainer.step

    def delete(self, images, masks):
        if self.step_index == 6:
            shutil.rmtree("run")
        return step(self, images, masks)

    monkeypatch.setattr(Trainer, "step", delete)
    assert cli.main(["pretrain", *small_arguments("run")]) == 0
    assert "run was deleted while the run goes on: it is back" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, 13))
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.suffix != ".png") == [
        "checkpoints", "lock", "metrics.jsonl", "recipe.json", "summary.md",
    ]  # fmt: skip
    assert cli.main(["pretrain", "--resume", "run", "--train.steps", "13"]) == 0


def test_unreadable_images_are_counted_beyond_the_list(tmp_path, capsys):
    settings = photographs(tmp_path / "photos", 60)
    for number in range(0, 60, 2):
        (tmp_path / "photos" / "class-0" / f"{number}.png").write_bytes(b"not an image")
    settings |= {"train__steps": 10, "train__batch_size": 6}
    assert cli.main(["pretrain", *small_arguments("run", **settings)]) == 0
    told = "30 of 60 images could not be read and were replaced by others"
    assert told in " ".join(capsys.readouterr().out.split())
    summary = (tmp_path / "run" / "summary.md").read_text()
    assert told in summary and "- and 10 more" in summary


# Folders that are mistaken for one another.


@pytest.mark.parametrize("name", ["photos", "./photos"])
def test_a_folder_in_the_place_of_a_recipe(tmp_path, capsys, name):
    photographs(tmp_path / "photos", 3)
    assert cli.main(["pretrain", name]) == 1
    assert f"images are given by --data.path {name}, runs by" in capsys.readouterr().err


def test_a_run_beside_its_images_adds_none_to_them(tmp_path):
    """`--data.path .`, where runs/ is: its curves were images of the next run, and a resumed run
    was refused as one on other data."""
    photographs(tmp_path, 12, classes=1)
    settings = {"data__source": "folder", "data__path": "."}
    for folder in ("runs/a", "runs/b"):
        pretrain(small_recipe(folder, **settings, train__steps=2))
        assert load_checkpoint(folder).metadata["data"]["images"] == 12
    assert cli.main(["pretrain", "--resume", "runs/a", "--train.steps", "3"]) == 0


def test_the_folder_of_the_images_is_no_output(tmp_path, capsys):
    settings = photographs(tmp_path / "photos", 12)
    assert cli.main(["pretrain", *small_arguments("photos/.", **settings)]) == 1
    assert "is the folder of the images" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "photos").iterdir()) == ["class-0", "class-1"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "recipe.json", "summary.md", "curves.png"])
def test_files_of_other_programs_are_not_written_over(tmp_path, capsys, name):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / name).write_text("weeks of work")
    assert cli.main(["pretrain", *small_arguments("results")]) == 1
    assert f"holds {name} from somewhere else" in capsys.readouterr().err
    assert (tmp_path / "results" / name).read_text() == "weeks of work"


def test_a_folder_that_takes_no_recipe_is_left_empty(tmp_path, monkeypatch, capsys):
    def full(path, text):
        raise NotWritten(f"{path.name} could not be written")

    monkeypatch.setattr("ijepa.train.run_folder.write_whole", full)
    assert cli.main(["pretrain", *small_arguments("run")]) == 1
    assert "recipe.json could not be written" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for output, reason in (("file", "File exists"), ("file/run", "Not a directory")):
        assert cli.main(["pretrain", *small_arguments(output)]) == 1
        assert f"train.output {output} cannot be made: {reason}" in capsys.readouterr().err
