"""The training step: skips, accumulation, clipping, parameter groups, resuming."""

import copy
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ijepa import IJEPA, MaskBatch, ModelConfig, OptimConfig, ScheduleConfig, Trainer
from ijepa.train.optim import ema_pairs, parameter_groups

CONFIG = ModelConfig(
    image_size=(16, 16),
    channels=3,
    patch_size=(4, 4),
    width=16,
    depth=2,
    heads=2,
    predictor_width=8,
    predictor_depth=1,
    predictor_heads=1,
)
SCHEDULE = ScheduleConfig(total_steps=20, warmup_steps=2)
CONTEXT = [[0, 1, 5], [2, 3, 4, 5, 6, 11], [8], [9, 14]]
TARGETS = [
    [[2, 3], [7, 10, 11]], [[0], [0, 1]], [[1, 4, 5, 7], [11, 10, 9, 2]], [[15], [12, 13]],
]  # fmt: skip


def make_trainer(seed=0, **optim):
    torch.manual_seed(seed)
    return Trainer(IJEPA(CONFIG), OptimConfig(**optim), SCHEDULE)


def make_images(seed):
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def make_masks(images=slice(None)):
    return MaskBatch.from_lists(CONTEXT[images], TARGETS[images], CONFIG.grid)


def snapshot(trainer):
    """Everything an update may touch."""
    return copy.deepcopy((trainer.model.state_dict(), trainer.optimizer.state_dict()))


def assert_equal(a, b, but=()):
    """Bitwise, through nested dicts and lists."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert set(a) == set(b)
        for key in a:
            if key not in but:
                assert_equal(a[key], b[key], but)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y, but)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize("fault", ["image", "loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_step_changes_nothing_but_the_counters(fault, value):
    trainer = make_trainer()
    assert not trainer.step(make_images(0), make_masks()).skipped
    before = snapshot(trainer)

    handle, images = None, make_images(1)
    if fault == "image":
        images[2, 0, 8, 3] = value  # patch 8: the third image's context
    elif fault == "loss":  # finite gradients beside a loss that is not
        handle = trainer.model.register_forward_hook(lambda *args: args[2] + value)
    else:
        norm = trainer.model.context_encoder.norm.weight
        handle = norm.register_hook(lambda gradient: torch.full_like(gradient, value))
    result = trainer.step(images, make_masks())
    if handle is not None:
        handle.remove()

    assert result.skipped and result.skipped.dtype == torch.bool
    assert_equal(snapshot(trainer), before, but=("lr", "weight_decay", "momentum"))
    assert trainer.step_index == 2  # schedules and data go on
    assert trainer.total_skips == 1 and result.consecutive_skips == 1

    third = trainer.step(make_images(2), make_masks())
    assert not third.skipped and third.consecutive_skips == 0 and trainer.total_skips == 1
    assert result.consecutive_skips == 1  # what was read late is that step's value
    # Adam took two steps, so the skipped one left no trace in the bias correction
    plain = make_trainer()
    plain.step(make_images(0), make_masks())
    plain.step_index = 2
    plain.step(make_images(2), make_masks())
    assert_equal(plain.model.state_dict(), trainer.model.state_dict())


def test_skips_in_a_row_are_counted():
    trainer = make_trainer()
    bad = make_images(0) * float("nan")
    counts = [int(trainer.step(bad, make_masks()).consecutive_skips) for _ in range(3)]
    assert counts == [1, 2, 3] and trainer.total_skips == 3


def test_micro_batches_add_up_to_the_batch():
    """Of unequal sizes: every predicted element weighs the same."""
    images = make_images(0)
    whole, parts = make_trainer(), make_trainer()
    expected = whole.step(images, make_masks())
    found = parts.step([images[:1], images[1:]], [make_masks(slice(1)), make_masks(slice(1, 4))])
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.grad_norm, expected.grad_norm, atol=0, rtol=1e-5)
    pairs = zip(whole.model.named_parameters(), parts.model.parameters(), strict=True)
    for (name, a), b in pairs:
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4, msg=name)
    with pytest.raises(ValueError, match="as many image tensors as masks"):
        parts.step([images], [make_masks(), make_masks()])


def test_update_is_adamw_on_clipped_gradients_and_a_moving_average():
    trainer = make_trainer(max_grad_norm=0.01, eps=1e-3)
    before = copy.deepcopy(trainer.model)
    images, masks = make_images(0), make_masks()
    result = trainer.step(images, masks)

    before(images, masks).backward()
    trained = {n: p for n, p in before.named_parameters() if p.grad is not None}
    norm = torch.stack([p.grad.square().sum() for p in trained.values()]).sum().sqrt()
    torch.testing.assert_close(result.grad_norm, norm, rtol=1e-5, atol=0)
    assert norm > 0.02  # so that clipping happens
    after = dict(trainer.model.named_parameters())
    for name, p in trained.items():
        gradient = p.grad * (0.01 / norm)
        # the first AdamW step: both bias-corrected moments are the gradient's own
        decay = result.weight_decay if p.ndim > 1 else 0.0
        update = gradient / (gradient.abs() + 1e-3)
        expected = p * (1 - result.lr * decay) - result.lr * update
        torch.testing.assert_close(after[name], expected, atol=1e-7, rtol=0, msg=name)
    for name, target in before.target_encoder.named_parameters():
        source = after[f"context_encoder.{name}"]
        expected = result.momentum * target + (1 - result.momentum) * source
        torch.testing.assert_close(
            after[f"target_encoder.{name}"], expected, atol=1e-7, rtol=0, msg=name
        )


def test_parameter_groups_are_the_released_ones():
    model = IJEPA(CONFIG)
    decayed, others = parameter_groups(model)
    assert decayed["decayed"] and not others["decayed"]
    names = {id(p): name for name, p in model.named_parameters()}
    without = {names[id(p)] for p in others["params"]}
    with_decay = {names[id(p)] for p in decayed["params"]}
    assert "predictor.mask_token" in with_decay
    assert all(name.endswith("bias") or "norm" in name for name in without)
    assert not any(name.endswith("bias") or "norm" in name for name in with_decay)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert without | with_decay == trained and not without & with_decay
    assert not any("pos_embed" in name or "target_encoder" in name for name in trained)
    assert len(ema_pairs(model)) == len(list(model.target_encoder.parameters())) - 1


def test_resuming_is_bit_exact(tmp_path):
    whole = make_trainer()
    results = [whole.step(make_images(step), make_masks()) for step in range(4)]

    first = make_trainer()
    for step in range(2):
        first.step(make_images(step), make_masks())
    torch.save({"m": first.model.state_dict(), "t": first.state_dict()}, tmp_path / "x")
    saved = torch.load(tmp_path / "x", weights_only=True)
    second = make_trainer(seed=1)
    second.model.load_state_dict(saved["m"])
    second.load_state_dict(saved["t"])
    for step in range(2, 4):
        result = second.step(make_images(step), make_masks())
        assert torch.equal(result.loss, results[step].loss) and result.lr == results[step].lr
    assert_equal(second.model.state_dict(), whole.model.state_dict())
    with pytest.raises(ValueError, match="trainer state must hold"):
        second.load_state_dict({"step_index": 3})


def run_rank(rank, folder):
    """One of two ranks: half of the images each, the third step not finite on rank 1 alone."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/group",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=3),  # where the other one died
    )
    trainer, half = make_trainer(eps=1e-3), slice(2 * rank, 2 * rank + 2)
    results = []
    for step in range(3):
        images = make_images(step)[half]
        if step == 2 and rank == 1:
            images[0] = float("inf")
        results.append(trainer.step(images, make_masks(half)))
    figures = [(r.loss, r.grad_norm, r.skipped) for r in results]
    torch.save((figures, trainer.model.state_dict()), f"{folder}/{rank}")
    dist.destroy_process_group()


def run_other_rank(_, folder):
    torch.set_num_threads(1)
    run_rank(1, folder)


def test_two_ranks_train_as_one_process_does(tmp_path):
    other = mp.spawn(run_other_rank, (str(tmp_path),), nprocs=1, join=False)
    run_rank(0, tmp_path)
    other.join()
    (figures, weights), (other_figures, other_weights) = (
        torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2)
    )
    assert_equal(weights, other_weights)
    whole = make_trainer(eps=1e-3)
    for step in range(2):
        result = whole.step(make_images(step), make_masks())
        torch.testing.assert_close(figures[step][0], result.loss, atol=1e-6, rtol=0)
        torch.testing.assert_close(figures[step][1], result.grad_norm, atol=0, rtol=1e-4)
        assert torch.equal(figures[step][0], other_figures[step][0])
    assert figures[2][2] and other_figures[2][2]  # both skip what one cannot use
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(weights[name], value, atol=1e-6, rtol=0, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_step_never_waits_for_the_device(max_grad_norm):
    torch.manual_seed(0)
    trainer = Trainer(IJEPA(CONFIG).cuda(), OptimConfig(max_grad_norm=max_grad_norm), SCHEDULE)
    images, masks = make_images(0).cuda(), make_masks().to("cuda")
    trainer.step(images, masks)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(images, masks)
        trainer.step([images, images], [masks, masks])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.total_skips.item() == 0


def test_bf16_steps_train():
    torch.manual_seed(0)
    schedule = replace(SCHEDULE, peak_lr=3e-3, warmup_steps=1, total_steps=30)
    trainer = Trainer(IJEPA(CONFIG), OptimConfig(), schedule, precision="bf16")
    losses = [trainer.step(make_images(0), make_masks()).loss.item() for _ in range(15)]
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_settings_a_trainer_cannot_run_are_refused():
    for config in (ScheduleConfig(), ScheduleConfig(total_steps=9, warmup_epochs=1.0)):
        with pytest.raises(ValueError, match="lengths must be known in steps"):
            Trainer(IJEPA(CONFIG), OptimConfig(), config)
    with pytest.raises(ValueError, match="precision must be"):
        Trainer(IJEPA(CONFIG), OptimConfig(), SCHEDULE, precision="fp16")


FLOAT8_CONFIG = replace(CONFIG, width=32, heads=2, depth=2)


def make_float8_trainer(precision="bf16-params", **settings):
    torch.manual_seed(0)
    return Trainer(
        IJEPA(FLOAT8_CONFIG), OptimConfig(), SCHEDULE, precision=precision, **settings
    )


def take_steps(trainer, first, last):
    for seed in range(first, last):
        loss = trainer.step(make_images(seed), make_masks()).loss
    return loss


@pytest.mark.parametrize("precision", ["bf16", "bf16-params"])
def test_targets_in_float8(precision):
    """Near the same step without, not equal to it; the encoder called by itself stays exact."""
    plain = make_float8_trainer(precision)
    rounded = make_float8_trainer(precision, target_precision="fp8")
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        exact, _ = plain.model.targets(make_images(0), make_masks())
        found, _ = rounded.model.targets(make_images(0), make_masks())
        alone = rounded.model.target_encoder(make_images(0))
        assert torch.equal(alone, plain.model.target_encoder(make_images(0)))
    distance = (found.double() - exact.double()).norm() / exact.double().norm()
    assert 1e-3 < distance < 0.1
    losses = [take_steps(trainer, 0, 6).item() for trainer in (plain, rounded)]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.05)


def test_a_block_in_float8_is_traced_whole():
    """What torch.compile makes one graph of on a GPU; its own code is slow to build here."""
    model = make_float8_trainer(target_precision="fp8").model
    images, masks = make_images(0), make_masks()
    expected, _ = model.targets(images, masks)
    for block in model.target_encoder.blocks:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    found, _ = model.targets(images, masks)
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)


def test_copies_follow_the_targets_and_are_not_in_the_checkpoint():
    trainer = make_float8_trainer(target_precision="fp8")
    before = trainer.model.targets(make_images(9), make_masks())[0]
    take_steps(trainer, 0, 3)
    qkv = trainer.model.target_encoder.blocks[0].attn.qkv
    distance = (qkv.float8.dequantized() - qkv.weight.float()).abs().max()
    assert distance <= qkv.weight.float().abs().max() / 16
    assert not torch.equal(before, trainer.model.targets(make_images(9), make_masks())[0])
    plain = make_float8_trainer()
    assert list(trainer.weights()) == list(plain.weights())
    assert_equal_keys(trainer.state_dict(), plain.state_dict())


def assert_equal_keys(a, b):
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal_keys(a[key], b[key])


@pytest.mark.parametrize("at", ["fp8", "same"])
def test_a_float8_run_resumes_exactly_and_from_one_without(at):
    whole = make_float8_trainer(target_precision="fp8")
    first = make_float8_trainer(target_precision=at)
    take_steps(first, 0, 3)
    weights, state = copy.deepcopy((first.weights(), first.state_dict()))
    resumed = make_float8_trainer(target_precision="fp8")
    resumed.model.load_state_dict(weights)
    resumed.load_state_dict(state)
    loss = take_steps(resumed, 3, 6)
    if at == "fp8":
        take_steps(whole, 0, 3)
        assert torch.equal(loss, take_steps(whole, 3, 6))
        assert_equal(resumed.weights(), whole.weights())
    assert loss.isfinite()


def test_float8_settings_are_checked():
    with pytest.raises(ValueError, match="goes with precision"):
        make_float8_trainer("fp32", target_precision="fp8")
    with pytest.raises(ValueError, match="'same' or 'fp8', got 'int8'"):
        make_float8_trainer(target_precision="int8")
    with pytest.raises(ValueError, match=r"multiples of 16, got \(24, 8\)"):
        torch.manual_seed(0)
        small = IJEPA(replace(CONFIG, width=8, heads=1))
        Trainer(small, OptimConfig(), SCHEDULE, precision="bf16", target_precision="fp8")


@pytest.mark.parametrize("parallel", ["fsdp", "hsdp"])
def test_float8_targets_of_shards_are_refused(parallel, monkeypatch):
    monkeypatch.setattr("ijepa.train.trainer.world_size", lambda: 2)
    with pytest.raises(ValueError, match=f"whole weights on every rank, .* '{parallel}' does not"):
        make_float8_trainer(target_precision="fp8", parallel=parallel)
