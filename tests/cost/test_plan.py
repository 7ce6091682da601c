"""`ijepa plan`, and how close a run comes to it."""

from dataclasses import replace

import numpy as np
import pytest

from ijepa import MultiBlockSampler
from ijepa.cli import main
from ijepa.cost.flops import flops_per_image, sample_tokens
from ijepa.cost.gpus import known_gpu
from ijepa.cost.plan import plan_recipe
from ijepa.counter_rng import derive_keys
from ijepa.recipes import load_recipe
from ijepa.report.progress import RunProgress


def test_a_plan_adds_up():
    recipe = load_recipe("vith14")
    one, eight = (plan_recipe(recipe, gpu="H200", gpus=gpus, mfu=0.4) for gpus in (1, 8))
    total = sum(part.total for part in one.flops.values())
    assert one.images_per_second == pytest.approx(0.4 * 989e12 / total)
    assert one.seconds == pytest.approx(8 * eight.seconds)
    assert one.images == pytest.approx(300 * 1_281_167, rel=0.01)
    room = 141 * 2**30 * 0.92 - one.state_bytes
    assert one.largest_batch == int(room // one.image_bytes) > 100
    checkpointed = replace(recipe, model=replace(recipe.model, activation_checkpointing=True))
    assert plan_recipe(checkpointed, gpu="h200").largest_batch > 3 * one.largest_batch
    fp32 = replace(recipe, train=replace(recipe.train, precision="fp32"))
    assert plan_recipe(fp32, gpu="h200").largest_batch < one.largest_batch


def test_truncated_masks_are_planned_at_their_micro_batch():
    """The shortest context of a batch is shorter in a larger one."""
    recipe = load_recipe("vitb16")
    recipe = replace(recipe, masks=replace(recipe.masks, batching="truncate"))
    small, large = sample_tokens(recipe, 8), sample_tokens(recipe, 128)
    assert (small.images, large.images) == (8, 128)
    assert small.context > 1.2 * large.context
    sampler = MultiBlockSampler(recipe.model.grid, batching="truncate")
    shortest = [len(sampler(keys=derive_keys(9, b, np.arange(8))).context) / 8 for b in range(64)]
    assert small.context == pytest.approx(np.mean(shortest), rel=0.05)
    packed = load_recipe("vitb16")
    contexts = [sample_tokens(packed, images).context for images in (8, 128)]
    assert contexts[0] == pytest.approx(contexts[1], rel=0.02)


def test_live_mfu():
    assert known_gpu("NVIDIA H100 80GB HBM3").label == "H100 SXM"
    assert known_gpu("NVIDIA A100-SXM4-40GB").memory == 40
    assert known_gpu("NVIDIA GeForce RTX 4090").teraflops == 165
    assert known_gpu("Some Card 9000") is None
    recipe = load_recipe("vitb16")
    plan = plan_recipe(recipe, gpu="h200", gpus=1, mfu=0.5)
    planned = sum(part.total for part in plan.flops.values())
    assert flops_per_image(recipe, int(plan.micro_batch)) == pytest.approx(planned)
    progress = RunProgress(None, 10, 0, batch_size=8, images_per_second_at_peak=2000.0)
    assert progress.mfu() is None  # nothing measured yet
    progress.images_per_second = 500.0
    assert progress.mfu() == 0.25


def test_the_command(capsys):
    assert main(["plan", "vitb16", "--gpus", "16", "--gpu", "a100", "--mfu", "0.2"]) == 0
    shown = capsys.readouterr().out
    for part in ("16 x A100", "20% MFU of 312", "GFLOP an image", "largest micro-batch", "days"):
        assert part in shown


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["vitb16", "--gpu", "h300"], "unknown GPU 'h300'; did you mean 'h200'? Valid: a100,"),
        (["vitb16", "--gpus", "none"], "--gpus must be a whole number, got 'none'"),
        (["vitb16", "--gpus", "0"], "gpus must be at least 1, got 0"),
        (["vitb16", "--mfu", "1.2"], "mfu must lie in (0, 1], got 1.2"),
        (["--gpus", "8"], "ijepa plan needs a recipe"),
        (["vitx"], "unknown recipe 'vitx'"),
    ],
)
def test_bad_plans_are_refused(arguments, complaint, capsys):
    assert main(["plan", *arguments]) == 1
    assert complaint in capsys.readouterr().err
