"""Ablations and sweeps: what is run, how it goes on, what the table says."""

import json
import math

import pytest
from small_runs import SETTINGS

from ijepa import cli
from ijepa.ablate.grid import grid_comparison
from ijepa.ablate.results import MAIN, Row, carries_over, cells, gather, mean, spread
from ijepa.ablate.runs import plan_runs
from ijepa.ablate.tables import TABLES, Comparison, Variant
from ijepa.recipes import load_recipe, recipe_to_dict


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IJEPA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def tiny(tmp_path):
    """A recipe file of runs that take a moment."""
    tables: dict[str, list[str]] = {}
    for key, value in {**SETTINGS, "monitor.evaluate": True, "train.steps": 3}.items():
        table, name = key.split(".")
        tables.setdefault(table, []).append(f"{name} = {json.dumps(value)}")
    lines = [f"[{table}]\n" + "\n".join(entries) for table, entries in tables.items()]
    path = tmp_path / "tiny.toml"
    path.write_text('base = "shapes-tiny"\n' + "\n".join(lines))
    return str(path)


@pytest.mark.parametrize("number", TABLES)
def test_every_row_is_a_recipe_of_its_own(number, tmp_path):
    base = load_recipe("ablation-small")
    planned = plan_runs(TABLES[number], base, tmp_path, range(2))
    assert len(planned) == 2 * len(TABLES[number].variants)
    assert len({run.folder for run in planned}) == len(planned)
    recipes = [recipe_to_dict(run.recipe) for run in planned if run.seed == 0]
    for recipe in recipes:
        recipe["train"]["output"] = None
    assert all(recipes.count(recipe) == 1 for recipe in recipes)
    assert all(variant.paper is not None for variant in TABLES[number].variants)


def test_the_runs_go_on_where_they_were(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["ablate", "7", "--base", tiny, "--seeds", "2", "--out", str(out), "--processes"]
    assert cli.main([*command, "1", "--limit", "2"]) == 0
    told = capsys.readouterr().out
    assert "2 of 2: pixels, seed 0 over" in told and "±" not in told
    folder = out / "table-7"
    first = (folder / "pixels" / "seed-0" / "probes.json").stat().st_mtime_ns
    assert cli.main([*command, "2"]) == 0
    told = capsys.readouterr().out
    assert "2 of 4 runs are over already" in told and "±" in told
    assert (folder / "pixels" / "seed-0" / "probes.json").stat().st_mtime_ns == first
    assert "step 3/3" in (folder / "pixels" / "seed-1" / "log.txt").read_text()
    assert cli.main([*command, "2"]) == 0
    assert "4 of 4 runs are over already" in capsys.readouterr().out
    table = (folder / "table.md").read_text()
    assert "| pixels |" in table and " ± " in table and "| 40.7 |" in table and "ViT-L/16" in table
    assert len(json.loads((folder / "results.json").read_text())) == 2
    assert cli.main([*command, "2", "--set", "train.steps=4"]) == 1
    assert "holds a run with train.steps 3, not 4" in capsys.readouterr().err


def test_a_run_that_fails_does_not_end_the_others(tiny, tmp_path, capsys):
    """Two rows: one whose context is impossible on this grid."""
    command = ["sweep", tiny, "--vary", "masks.min_context=2,99", "--out", str(tmp_path / "out"),
               "--seeds", "1", "--processes", "1"]  # fmt: skip
    assert cli.main(command) == 1
    told = capsys.readouterr().out
    assert "failed: min_context 99, seed 0: " in told
    assert "1 of 2: min_context 2, seed 0 over" in told and "2 of 2" in told


def test_a_grid_is_every_combination():
    scales = "masks.target_scale=[0.1,0.2],[0.2,0.3]"
    grid = grid_comparison([scales, "masks.strategy=block,random"])
    assert [variant.settings for variant in grid.variants] == [
        {"masks.target_scale": scale, "masks.strategy": strategy}
        for scale in ([0.1, 0.2], [0.2, 0.3])
        for strategy in ("block", "random")
    ]
    assert grid.variants[0].name == "target_scale (0.1, 0.2), strategy block"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "at least one --vary"),
        (["masks.strategy"], "names no value"),
        (["masks.strategi=1"], "did you mean 'masks.strategy'"),
        (["train.seed=1,2", "train.seed=3"], "given twice"),
        ([f"train.seed={','.join(map(str, range(1001)))}"], "1,001 combinations"),
    ],
)
def test_bad_grids_are_explained(given, message):
    with pytest.raises(ValueError, match=message):
        grid_comparison(given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ablate", "5"], "table 5 is none of the paper's ablations: 6 (mask strategies)"),
        (["ablate", "6", "--seeds", "0"], "seeds must be at least 1"),
        (["ablate", "6", "--set", "train.stepz=1"], "did you mean 'train.steps'"),
        (["ablate", "6", "--set", "masks.context_scale=[1.2,1.5]"], "multi-block: "),
        (["ablate", "6", "--set", "monitor.evaluate=false"], "leave monitor.evaluate on"),
    ],
)
def test_mistakes_are_named(arguments, message, capsys, tmp_path):
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def _rows(*scores):
    variants = [Variant(str(n), {}, paper) for n, (paper, _) in enumerate(scores)]
    return [
        Row(variant, {MAIN: values, "linear probe, mean and std": values,
                      "whitened kNN, last block": values}, list(range(len(values))))
        for variant, (_, values) in zip(variants, scores, strict=True)
    ]  # fmt: skip


def test_only_what_stands_out_of_the_spread_carries_over():
    rows = _rows((50.0, [0.5, 0.52]), (40.0, [0.3, 0.31]), (30.0, [0.7, 0.71]), (20.0, [0.3, 0.72]))
    same, reverse, undecided = carries_over(rows)
    assert same == "Found here too: 0 over 1."
    assert reverse == "The other way round here: 0 over 2; 1 over 2."
    assert undecided.startswith("Not told apart here: 0 over 3;")
    assert carries_over(_rows((50.0, [0.9]), (40.0, [0.1]))) == ["Not told apart here: 0 over 1."]


def test_the_table_holds_mean_and_sample_deviation():
    header, line = cells(_rows((50.0, [0.2, 0.4, 0.6])))
    assert header[1] == MAIN and line == ["0", *["40.0 ± 20.0"] * 3, "3", "50.0"]
    assert mean([1.0, 2.0]) == 1.5 and spread([1.0, 3.0]) == pytest.approx(math.sqrt(2))
    assert math.isnan(mean([])) and math.isnan(spread([1.0]))


def test_a_task_that_is_not_there_is_named(tiny, tmp_path):
    comparison = Comparison("one", "one", (Variant("a", {}),))
    planned = plan_runs(comparison, load_recipe(tiny), tmp_path, [0])
    planned[0].folder.mkdir(parents=True)
    scores = {"shape": {"linear": 0.5, "knn": 0.4, "whitened_knn": 0.3}}
    names = ("last block", "last 4 blocks", "last 4 blocks, mean and std")
    rows = [{"features": f"pretrained, {name}", "scores": scores} for name in names]
    text = json.dumps({"chance": {"shape": 0.1}, "rows": rows})
    (planned[0].folder / "probes.json").write_text(text)
    assert gather(comparison, planned, None)[0].scores[MAIN] == [0.5]
    with pytest.raises(ValueError, match="no task 'count', but shape"):
        gather(comparison, planned, "count")
