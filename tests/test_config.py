"""Recipes: what ships, what is refused, how overrides and bases combine."""

import dataclasses
import re

import pytest

from ijepa.config import (
    MAX_HEAD_DIM,
    DataConfig,
    MaskConfig,
    ModelConfig,
    MonitorConfig,
    OptimConfig,
    Recipe,
    ScheduleConfig,
    TrainConfig,
)
from ijepa.recipes import load_recipe, recipe_from_dict, recipe_names, recipe_to_dict

# width, depth, heads, patch, image, predictor depth, epochs, warm-up epochs (paper appendix A.1,
# released configurations in1k_vith14_ep300, in1k_vith16-448_ep300, in22k_vitg16_ep44)
PUBLISHED = {
    "vitb16": (768, 12, 12, 16, 224, 6, 600, 40),
    "vitl16": (1024, 24, 16, 16, 224, 12, 600, 40),
    "vith14": (1280, 32, 16, 14, 224, 12, 300, 40),
    "vith16-448": (1280, 32, 16, 16, 448, 12, 300, 40),
    "vitg16": (1408, 40, 16, 16, 224, 16, 44, 3),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_hold_the_published_settings(name):
    recipe = load_recipe(name)
    model, schedule = recipe.model, recipe.schedule
    width, depth, heads, patch, image, predictor_depth, epochs, warmup = PUBLISHED[name]
    assert (model.width, model.depth, model.heads) == (width, depth, heads)
    assert model.patch_size == (patch, patch) and model.image_size == (image, image)
    assert (model.predictor_width, model.predictor_depth) == (384, predictor_depth)
    assert model.predictor_heads == heads
    assert round(model.width * model.mlp_ratio) == (6144 if name == "vitg16" else 4 * width)
    assert (recipe.train.epochs, recipe.train.batch_size) == (epochs, 2048)
    assert (schedule.warmup_epochs, schedule.start_lr) == (warmup, 2e-4)
    assert (schedule.peak_lr, schedule.final_lr, schedule.stretch) == (1e-3, 1e-6, 1.0)
    assert (schedule.weight_decay, schedule.final_weight_decay) == (0.04, 0.4)
    assert (schedule.momentum, schedule.final_momentum) == (0.996, 1.0)
    assert (model.loss, schedule.weight_decay_shape) == ("smooth_l1", "cosine")
    assert recipe.data.crop_scale == (0.3, 1.0) and not recipe.data.flip
    assert recipe.masks == MaskConfig(
        context_scale=(0.85, 1.0), target_scale=(0.15, 0.2), target_aspect=(0.75, 1.5)
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_paper_variants_differ_in_what_the_paper_says_and_nothing_else(name):
    official, paper = (
        recipe_to_dict(load_recipe(name)),
        recipe_to_dict(load_recipe(f"{name}-paper")),
    )
    changed = {
        f"{table}.{key}": paper[table][key]
        for table in official
        if table != "name"
        for key in official[table]
        if official[table][key] != paper[table][key]
    }
    assert changed == {
        "model.loss": "l2",
        "schedule.warmup_epochs": 15.0,
        "schedule.start_lr": 1e-4,
        "schedule.weight_decay_shape": "linear",
    }
    assert paper["name"] == f"{name}-paper"


def test_every_shipped_recipe_is_valid_and_survives_a_round_trip():
    assert {"shapes-tiny", "scenes-small"} <= set(recipe_names())
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe_from_dict(recipe_to_dict(recipe)) == recipe
        assert recipe.in_steps(1_000_000).schedule.total_steps > 0


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            {"train.batchsize": 1},
            r"train\.batchsize.*did you mean 'train\.batch_size'.*train\.seed",
        ),
        ({"trian.steps": 1}, r"unknown setting 'trian\.steps'.*did you mean 'train\.steps'"),
        ({"model.loss": "l1"}, r"model\.loss.*'l1'.*Valid: smooth_l1, l2"),
        ({"train.steps": "many"}, r"train\.steps must be of type int, got 'many'"),
        ({"train.steps": True}, r"train\.steps must be of type int"),
        ({"masks.target_scale": [0.1]}, r"target_scale must have 2 entries"),
        ({"masks.target_scale": 0.1}, r"target_scale must be a list"),
        ({"model.width": 98}, r"width must be a multiple of 4, got 98"),
        ({"model.image_size": [33, 32]}, r"for 33 and patches of 4 the nearest is 32"),
    ],
)
def test_bad_overrides_are_refused_with_what_is_valid(overrides, expected):
    with pytest.raises(ValueError, match=expected):
        load_recipe("shapes-tiny", overrides)


def test_an_unknown_recipe_names_the_nearest_and_all():
    with pytest.raises(ValueError, match=r"'vitb61'; did you mean 'vitb16'.*scenes-small.*vith14"):
        load_recipe("vitb61")


@pytest.mark.parametrize(
    "make",
    [
        lambda: ModelConfig(heads=7),
        lambda: ModelConfig(image_mean=(0.5,)),
        lambda: ModelConfig(patch_init_std=0.0),
        lambda: ModelConfig(mlp_ratio=1e-4),  # a hidden layer of none
        lambda: ModelConfig(predictor_width=8, predictor_heads=1, mlp_ratio=0.05),
        lambda: MaskConfig(target_scale=(0.3, 0.2)),
        lambda: MaskConfig(context_scale=(0.85, 1.1)),
        lambda: MaskConfig(num_targets=0),
        lambda: MaskConfig(target_share=1.0),
        lambda: DataConfig(path="x"),
        lambda: DataConfig(source="folder", path=" "),  # would be the current folder
        lambda: OptimConfig(eps=1e-300),  # 0 in float32
        lambda: DataConfig(workers=-1),
        lambda: DataConfig(crop_scale=(0.0, 1.0)),
        lambda: OptimConfig(betas=(0.9, 1.0)),
        lambda: OptimConfig(max_grad_norm=0.0),
        lambda: ScheduleConfig(stretch=0.5),
        lambda: ScheduleConfig(warmup_steps=3, warmup_epochs=1.0),
        lambda: ScheduleConfig(momentum=1.1),
        lambda: ScheduleConfig(peak_lr=float("nan")),
        lambda: TrainConfig(steps=3, epochs=1.0),
        lambda: TrainConfig(batch_size=10, accumulate=3),
        lambda: TrainConfig(steps=0),
        lambda: MonitorConfig(images=1),
    ],
)
def test_values_out_of_range_are_refused(make):
    with pytest.raises(ValueError):
        make()


@pytest.mark.parametrize("value", [1e308, 1e38, float("inf"), float("nan"), -1.0])
@pytest.mark.parametrize(
    ("config", "name"),
    [
        (ModelConfig, "image_mean"),
        (ModelConfig, "image_std"),
        (ModelConfig, "patch_init_std"),
        (OptimConfig, "eps"),
        (ScheduleConfig, "start_lr"),
        (ScheduleConfig, "peak_lr"),
        (ScheduleConfig, "final_lr"),
        (ScheduleConfig, "weight_decay"),
        (ScheduleConfig, "final_weight_decay"),
    ],
)
def test_numbers_beyond_sense_are_refused_by_name(config, name, value):
    """1e308 is finite and turns a run into NaN at its first step."""
    entries = (0.5, value, 0.5) if name.startswith("image_") else value
    with pytest.raises(ValueError, match=rf"{name} must .*{re.escape(str(value))}"):
        config(**{name: entries})


def test_heads_are_those_that_the_attention_takes():
    from masked_vit_kernels.attention.config import MAX_HEAD_DIM as WIDEST

    assert MAX_HEAD_DIM == WIDEST
    for values, got in (({"width": 48, "heads": 4}, 12), ({"width": 272, "heads": 2}, 136),
                        ({"predictor_width": 40, "predictor_heads": 2}, 20)):  # fmt: skip
        with pytest.raises(ValueError, match=rf"must be a multiple of 8 up to 128, got {got}"):
            ModelConfig(**values)


def test_a_base_that_is_a_file_lies_beside_the_one_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "there" / "deep").mkdir(parents=True)
    (tmp_path / "there" / "mine.toml").write_text('base = "vitb16"\n[model]\ndepth = 2\n')
    (tmp_path / "there" / "beside.toml").write_text('base = "mine.toml"\n')
    (tmp_path / "there" / "deep" / "above.toml").write_text('base = "../beside.toml"\n')
    (tmp_path / "there" / "deep" / "loop.toml").write_text('base = "../deep/loop.toml"\n')
    monkeypatch.chdir(tmp_path)
    assert load_recipe("there/beside.toml").model.depth == 2
    assert load_recipe("there/deep/above.toml").model.depth == 2
    monkeypatch.chdir(tmp_path / "there")
    assert load_recipe("beside.toml").model.depth == 2
    with pytest.raises(ValueError, match="its own base"):
        load_recipe("deep/loop.toml")


def test_a_byte_order_mark_is_read_and_latin_1_refused_by_name(tmp_path):
    text = '# größer\nbase = "vitb16"\n[model]\ndepth = 2\n'
    (tmp_path / "marked.toml").write_text(text, encoding="utf-8-sig")
    assert load_recipe(str(tmp_path / "marked.toml")).model.depth == 2
    (tmp_path / "old.toml").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"old\.toml is not UTF-8 \(byte 0xf6 at position 4\)"):
        load_recipe(str(tmp_path / "old.toml"))


def test_a_file_may_build_on_another_recipe(tmp_path):
    (tmp_path / "mine.toml").write_text('base = "vitb16"\n[train]\nsteps = 7\n[model]\ndepth = 2\n')
    (tmp_path / "more.toml").write_text(
        f'base = "{tmp_path}/mine.toml"\n[schedule]\nwarmup_steps = 3\n'
    )
    mine, more = load_recipe(str(tmp_path / "mine.toml")), load_recipe(str(tmp_path / "more.toml"))
    assert (mine.name, mine.model.depth, mine.model.width) == ("mine", 2, 768)
    # steps replace the base's epochs: the two are ways to say one thing
    assert (mine.train.steps, mine.train.epochs, mine.schedule.warmup_epochs) == (7, None, 40.0)
    assert (more.schedule.warmup_steps, more.schedule.warmup_epochs) == (3, None)


def test_broken_files_are_refused_by_name(tmp_path):
    for text, expected in (
        ("[train\n", "not valid TOML"),
        ("[training]\nsteps = 3\n", r"unknown table 'training'.*Valid: .*train"),
        ("[train]\nstep = 3\n", r"unknown key in \[train\] 'step'; did you mean 'steps'"),
        ("train = 3\n", "train must be a table"),
        (f'base = "{tmp_path}/bad.toml"\n', "its own base"),
    ):
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(ValueError, match=expected):
            load_recipe(str(tmp_path / "bad.toml"))
    with pytest.raises(FileNotFoundError, match=r"absent\.toml"):
        load_recipe(str(tmp_path / "absent.toml"))


def test_lengths_become_steps():
    recipe = load_recipe("vith14").in_steps(1_281_167)  # ImageNet-1k: 625 steps an epoch
    assert (recipe.train.steps, recipe.train.epochs) == (187_500, None)
    assert (recipe.schedule.total_steps, recipe.schedule.warmup_steps) == (187_500, 25_000)
    assert recipe.in_steps(1_281_167) == recipe
    stretched = load_recipe("vith14", {"schedule.stretch": 1.25}).in_steps(1_281_167)
    assert (stretched.train.steps, stretched.schedule.total_steps) == (187_500, 234_375)
    short = load_recipe("vith14", {"train.steps": 100}).in_steps(1_281_167)
    assert (short.train.steps, short.schedule.total_steps, short.schedule.warmup_steps) == (
        100, 100, 100,
    )  # fmt: skip


def test_lengths_that_cannot_be_told_are_refused():
    with pytest.raises(ValueError, match=r"batch_size 64 exceeds the 63 images"):
        load_recipe("shapes-tiny", {"train.batch_size": 64}).in_steps(63)
    with pytest.raises(ValueError, match=r"train\.steps or train\.epochs"):
        Recipe().in_steps(1000)


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_recipe("shapes-tiny").train.steps = 3


@pytest.mark.parametrize(
    "name", ["../../evil", "/tmp/evil", "a\\b", "", ".", "..", "a\nb", "x" * 101]
)
def test_a_name_stays_inside_the_folder_of_runs(name):
    with pytest.raises(ValueError, match="name must be one that a folder can have"):
        load_recipe("shapes-tiny", {"name": name})
    assert load_recipe("shapes-tiny", {"name": "Größe 1.5 (b)"}).name == "Größe 1.5 (b)"


@pytest.mark.parametrize("output", ["", " "])
def test_an_output_without_a_name_is_refused(output):
    with pytest.raises(ValueError, match="output must name a folder"):
        TrainConfig(output=output)
