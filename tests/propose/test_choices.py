"""What is chosen for images, machine and hours: pure functions, with speeds made up."""

import math

import pytest
import torch

from ijepa.masks.from_config import build_mask_sampler
from ijepa.propose.choices import (
    MOST_PASSES,
    PANEL_SHARE,
    PANELS,
    TRAINING_SHARE,
    choose_size,
    flops_of,
    length_choices,
    recipe_of,
    worker_choice,
)
from ijepa.propose.images import ImageFacts
from ijepa.propose.machine import Machine, Speed
from ijepa.propose.sizes import SIZES

TWO_CORES = Machine("cpu", "2 CPU cores", 2, 16 << 30)
H200 = Machine("cuda", "NVIDIA H200", 16, 141 << 30)
SMALL_GPU = Machine("cuda", "a GPU of 8 GiB", 8, 8 << 30)


def facts(count=12_000, height=375, width=500, classes=0) -> ImageFacts:
    return ImageFacts(
        count=count, looked_at=min(count, 256), unreadable=0, height=height, width=width,
        mean=(0.41234, 0.4, 0.3), std=(0.2, 0.2, 0.0), classes=classes,
    )  # fmt: skip


def at_rate(flops_per_second, decode=1e-3):
    """A machine that does so many operations a second, whatever the network."""

    def measure(recipe):
        return Speed(flops_of(recipe) / flops_per_second, decode)

    return measure


def proposed(images, machine, hours, flops_per_second, decode=1e-3):
    """(size, recipe, seconds an image, reasons by key, why no larger one)."""
    measure = at_rate(flops_per_second, decode)
    sized = choose_size(images, machine, hours, measure, path="/photos")
    timed = recipe_of([*sized.choices, *length_choices(
        recipe_of(sized.choices), images, machine, hours, sized.speed)])  # fmt: skip
    choices = [
        *sized.choices,
        worker_choice(machine, sized.speed),
        *length_choices(timed, images, machine, hours, sized.speed),
    ]
    keys = [choice.key for choice in choices]
    assert len(keys) == len(set(keys)), "a setting is chosen twice"
    reasons = {choice.key: choice.reason for choice in choices}
    assert all(reasons.values())
    return sized.size, recipe_of(choices), sized.speed, reasons, sized.why_not_larger


def test_more_hours_images_and_speed_make_larger_networks():
    def label(images, machine, hours, rate):
        return proposed(images, machine, hours, rate)[0].label

    few, many = facts(800), facts(1_281_167)
    assert label(facts(), TWO_CORES, 0.1, 3e10) == "the demo's network"
    assert label(facts(), TWO_CORES, 24, 3e10) == "a small ViT"
    assert label(few, H200, 24, 3e14) == "the demo's network"
    assert label(facts(30_000), H200, 8, 1e14) == "ViT-S"
    assert label(many, H200, 24, 3e14) == "ViT-B"
    assert label(many, H200, 24 * 10, 3e14) == "ViT-L"
    assert label(many, H200, 24 * 30, 4e14) == "ViT-H"
    order = [size.label for size in SIZES]
    found = [order.index(label(many, H200, hours, 3e14)) for hours in (0.01, 1, 10, 100, 1000)]
    assert found == sorted(found) and found[-1] > found[0]


@pytest.mark.parametrize(
    ("images", "machine", "hours", "expected"),
    [
        (facts(800), H200, 24, "a small ViT (192 wide, 8 deep) wants 5,000 images to be worth it, "
                               "and there are 800"),
        (facts(), TWO_CORES, 0.1, "images in 6 minutes here, and wants 500,000 to be worth it"),
        (facts(1_281_167, height=20), H200, 1e4,
         "is for images of 112 pixels, at least a quarter of that, and the median is 500x20"),
        (facts(1_281_167), SMALL_GPU, 1e4, "does not fit into 8 GiB of a GPU of 8 GiB"),
        (facts(1_281_167), H200, 1e4, ""),
    ],
)  # fmt: skip
def test_what_speaks_against_a_larger_network_is_said(images, machine, hours, expected):
    rate = 3e10 if machine.device == "cpu" else 4e14
    assert expected in proposed(images, machine, hours, rate)[4]
    assert bool(expected) == bool(proposed(images, machine, hours, rate)[4])


@pytest.mark.parametrize("hours", [0.05, 1.0, 7.5])
@pytest.mark.parametrize("machine", [TWO_CORES, H200])
def test_a_run_takes_its_share_of_the_hours_and_no_more(hours, machine):
    images = facts(1_000_000)
    _, recipe, speed, _, _ = proposed(images, machine, hours, 3e10, decode=4e-3)
    seen = recipe.train.num_steps * recipe.train.batch_size
    if machine.device == "cpu":
        seconds = seen * (speed.step + 4e-3 / 2)
    else:
        seconds = seen * max(speed.step, 4e-3 / 15)
    one_step = recipe.train.batch_size * seconds / seen
    assert 0 <= TRAINING_SHARE * 3600 * hours - seconds <= one_step * 1.001


def test_few_images_are_not_seen_for_ever():
    _, recipe, _, reasons, _ = proposed(facts(200), H200, 100, 3e14)
    seen = recipe.train.num_steps * recipe.train.batch_size
    assert MOST_PASSES * 200 - recipe.train.batch_size < seen <= MOST_PASSES * 200
    assert "1,000 passes, more teach little" in reasons["train.steps"]
    _, _, _, reasons, _ = proposed(facts(), TWO_CORES, 0.01, 3e10)
    assert "little: the demo sees 102,400 images" in reasons["train.steps"]


@pytest.mark.parametrize(("hours", "expected"), [(0.001, 1), (0.04, 3), (2, PANELS)])
def test_panels_leave_short_runs_their_time(hours, expected):
    _, recipe, speed, _, _ = proposed(facts(), TWO_CORES, hours, 3e10)
    panels = recipe.train.num_steps / recipe.monitor.every
    assert expected - 1 < panels <= expected + 1e-9
    if expected > 1:
        seconds = panels * speed.step * recipe.monitor.images
        assert seconds <= PANEL_SHARE * 3600 * hours


@pytest.mark.parametrize("side", [1, 3, 8, 9, 20, 28, 31, 32, 33, 50, 63, 64, 97, 150, 224, 4000])
def test_images_of_any_size_get_a_grid_that_the_masks_fit(side):
    for machine, rate in ((TWO_CORES, 3e10), (H200, 4e14)):
        images = facts(2_000_000, height=side, width=2 * side)
        size, recipe, _, _, _ = proposed(images, machine, 5000, rate)
        height, width = recipe.model.image_size
        assert height == width <= max(side, 8)
        assert size.grid - 2 <= recipe.model.grid[0] <= size.grid + 3
        batch = build_mask_sampler(recipe.masks, recipe.model.grid, 4, torch.device("cpu"))(4)
        assert batch.batch_size == 4


@pytest.mark.parametrize("count", [1, 2, 3, 5, 31, 33, 100])
def test_a_batch_never_exceeds_the_images(count):
    images = facts(count)
    _, recipe, _, _, _ = proposed(images, TWO_CORES, 0.1, 3e10)
    recipe.in_steps(count)  # refuses a batch over the images
    assert recipe.train.batch_size in (1, 2, 4, 8, 16)
    assert recipe.monitor.images >= 2 and recipe.schedule.warmup_steps < recipe.train.num_steps


def test_every_size_is_a_recipe_and_its_heads_are_those_of_kernels():
    for size in SIZES:
        choices = choose_size(
            facts(5_000_000), H200, 1e9, at_rate(1e30 if size is SIZES[-1] else 4e14), path="/x"
        )
        assert choices.size == SIZES[-1]
        assert size.width // size.heads in (24, 32, 64, 80, 88)
        assert size.predictor_width // size.predictor_heads in (24, 32, 64, 80, 88)


def test_narrow_networks_get_what_they_need_and_wide_ones_what_was_published():
    _, tiny, _, reasons, _ = proposed(facts(), TWO_CORES, 0.5, 3e10)
    assert (tiny.model.init, tiny.model.target_norm) == ("fan_in", "instance")
    assert reasons["model.init"] == "the published .02 is 5.1 times too weak at width 96"
    pixels = 3 * math.prod(tiny.model.patch_size)
    assert tiny.model.patch_init_std == pytest.approx(pixels**-0.5, abs=5e-4)
    _, wide, _, _, _ = proposed(facts(1_281_167), H200, 24, 3e14)
    assert (wide.model.init, wide.model.target_norm) == ("released", "layer")
    assert wide.train.precision == "bf16-params" and tiny.train.precision == "fp32"


def test_micro_batches_fit_the_memory():
    _, recipe, _, reasons, _ = proposed(facts(1_281_167), H200, 24 * 90, 4e14)
    assert recipe.train.accumulate > 1 and not recipe.train.cuda_graph
    assert "the memory holds about" in reasons["train.accumulate"]
    assert recipe.train.batch_size % recipe.train.accumulate == 0
    _, recipe, _, _, _ = proposed(facts(), H200, 1, 1e13)
    assert recipe.train.accumulate == 1 and recipe.train.cuda_graph
    nothing = Machine("cuda", "a GPU", 8, 1 << 20)
    with pytest.raises(ValueError, match=r"the demo's network .* does not fit into 0 GiB of a GPU"):
        proposed(facts(), nothing, 1, 1e13)


def test_labels_are_probed_where_there_are_enough():
    for images, evaluate, words in (
        (facts(), False, "no labels"),
        (facts(1000, classes=10), True, "10 classes, the folders' names"),
        (facts(30, classes=10), False, "10 classes are too many for 30 images"),
    ):
        _, recipe, _, reasons, _ = proposed(images, TWO_CORES, 0.5, 3e10)
        assert recipe.monitor.evaluate == evaluate
        assert words in reasons["monitor.evaluate"]


def test_loaders_keep_up():
    assert worker_choice(TWO_CORES, Speed(10e-3, 0.1e-3)).value == 0
    assert worker_choice(TWO_CORES, Speed(2e-3, 2e-3)).value == 1
    assert worker_choice(H200, Speed(1e-3, 5e-3)).value == 6
    assert worker_choice(H200, Speed(1e-6, 5e-3)).value == 15
