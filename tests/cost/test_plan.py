"""`ijepa plan`: operations against PyTorch's counter, memory against what autograd keeps."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from masked_vit_kernels import cpu_linear, reference
from torch.utils.flop_counter import FlopCounterMode

from ijepa import IJEPA, ModelConfig, MultiBlockSampler, vit
from ijepa.cli import main
from ijepa.cost.flops import count_tokens, flops_per_image, sample_tokens, step_flops
from ijepa.cost.gpus import known_gpu
from ijepa.cost.memory import activation_bytes, count_parameters, state_bytes
from ijepa.cost.plan import plan_recipe
from ijepa.counter_rng import derive_keys
from ijepa.recipes import load_recipe
from ijepa.report.progress import RunProgress
from ijepa.train.trainer import Trainer

CONFIG = ModelConfig(
    image_size=(48, 40),
    patch_size=(8, 8),
    width=48,
    depth=3,
    heads=3,
    mlp_ratio=3.0,
    predictor_width=24,
    predictor_depth=2,
    predictor_heads=3,
)


def draw(config, images=6, seed=3):
    masks = MultiBlockSampler(config.grid)(keys=derive_keys(seed, np.arange(images)))
    shape = (images, config.channels, *config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)), masks


def counted_products(monkeypatch):
    """Matrix products that the counter sees: attention sequence by sequence, layers by F.linear."""

    def qkvpacked(qkv, cu_seqlens, max_seqlen, packing=None):
        return reference.varlen_attention(*qkv.unbind(1), cu_seqlens, cu_seqlens)[0]

    def kvpacked(q, kv, cu_q, cu_k, max_q, max_k, packing_q=None, packing_k=None):
        return reference.varlen_attention(q, *kv.unbind(1), cu_q, cu_k)[0]

    monkeypatch.setattr(vit, "varlen_attention_qkvpacked", qkvpacked)
    monkeypatch.setattr(vit, "varlen_attention_kvpacked", kvpacked)
    monkeypatch.setattr(cpu_linear, "ONEDNN_DTYPES", frozenset())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prune_predictor": False, "prune_target": False},
        {"share_predictor": True},
        {"share_predictor": True, "predictor_depth": 1},
        {"target": "pixels"},
        {"target_masking": "input"},
    ],
    ids=str,
)
def test_operations_are_those_that_pytorch_counts(settings, monkeypatch):
    """Exactly: every matrix product of the step is in the arithmetic and nothing else."""
    counted_products(monkeypatch)
    config = replace(CONFIG, **settings)
    model, (images, masks) = IJEPA(config), draw(config)
    with FlopCounterMode(display=False) as forward:
        loss = model(images, masks)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    parts = step_flops(config, count_tokens(masks)).values()
    planned = masks.batch_size * sum(p.forward for p in parts)
    assert planned == pytest.approx(forward.get_total_flops(), rel=1e-12)
    counted = forward.get_total_flops() + backward.get_total_flops()
    planned = masks.batch_size * sum(p.total for p in parts)
    assert planned == pytest.approx(counted, rel=1e-12)


def kept_for_backward(config, images, masks):
    """Bytes autograd holds at the end of the forward pass, weights and masks left out."""
    model = IJEPA(config)
    mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in mine:
            storages[storage.data_ptr()] = storage  # alive: no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(images, masks)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("size", [{}, {"width": 96, "predictor_width": 48, "depth": 5}], ids=str)
def test_activations_are_what_autograd_keeps(size):
    config = replace(CONFIG, **size)
    images, masks = draw(config)
    planned = masks.batch_size * activation_bytes(config, count_tokens(masks), "fp32")
    assert kept_for_backward(config, images, masks) == pytest.approx(planned, rel=0.05)


def test_state_is_what_the_optimiser_keeps():
    model, (images, masks) = IJEPA(CONFIG), draw(CONFIG)
    parameters = count_parameters(CONFIG)
    recipe = load_recipe("shapes-tiny").in_steps(12_000)
    trainer = Trainer(model, recipe.optim, recipe.schedule)
    trainer.step(images, masks)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == parameters["encoder"] + parameters["predictor"]
    held = 2 * sum(p.nbytes for p in trained)  # weights and gradients
    for state in trainer.optimizer.state.values():
        held += sum(value.nbytes for value in state.values() if value.ndim)
    frozen = model.target_encoder.pos_embed.nbytes
    held += sum(p.nbytes for p in model.target_encoder.parameters()) - frozen
    assert held == state_bytes(parameters, "fp32")


@pytest.mark.gpu
def test_peak_memory_on_a_gpu():
    config = ModelConfig(width=384, heads=6, predictor_heads=6)
    images, masks = draw(config, images=64)
    tokens, recipe = count_tokens(masks), load_recipe("shapes-tiny").in_steps(12_000)
    model = IJEPA(config).cuda()
    images, masks = images.cuda(), masks.to("cuda")
    trainer = Trainer(model, recipe.optim, recipe.schedule)
    trainer.step(images, masks)
    torch.cuda.reset_peak_memory_stats()
    trainer.step(images, masks)
    planned = state_bytes(count_parameters(config), "fp32")
    planned += 64 * activation_bytes(config, tokens, "fp32") + images.nbytes
    assert torch.cuda.max_memory_allocated() == pytest.approx(planned, rel=0.15)


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
        (["vitb16", "--gpus", "none"], "--gpus must be a number, got 'none'"),
        (["vitb16", "--gpus", "0"], "gpus must be at least 1, got 0"),
        (["vitb16", "--mfu", "1.2"], "mfu must lie in (0, 1], got 1.2"),
        (["--gpus", "8"], "ijepa plan needs a recipe"),
        (["vitx"], "unknown recipe 'vitx'"),
    ],
)
def test_bad_plans_are_refused(arguments, complaint, capsys):
    assert main(["plan", *arguments]) == 1
    assert complaint in capsys.readouterr().err
