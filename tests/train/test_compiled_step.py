"""The compiled step: one graph a capacity, no host reads, the eager losses; precisions; replays."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from ijepa import IJEPA, ModelConfig, MultiBlockSampler, OptimConfig, ScheduleConfig, Trainer
from ijepa.counter_rng import derive_keys
from ijepa.masks.layout import layout_of, tensors_of
from ijepa.masks.sizes import MaskSizes
from ijepa.train.cuda_graph import WARM_UP_STEPS, CapturedStep

CONFIG = ModelConfig(
    image_size=(24, 24),
    patch_size=(4, 4),
    width=16,
    depth=2,
    heads=2,
    mlp_ratio=2.0,
    predictor_width=8,
    predictor_depth=2,
    predictor_heads=1,
)
SCHEDULE = ScheduleConfig(total_steps=60, warmup_steps=2, momentum=0.9)
BATCH, STEPS = 4, 50


def capacity_sampler(count):
    """Capacities at quantiles of what the fifty batches hold, the largest holding all of them."""
    sampler = MultiBlockSampler(CONFIG.grid)
    names = ("context", "targets", "predictor", "target_union")
    totals = []
    for step in range(STEPS):
        masks = draw(sampler, step)
        packings = (masks.context_packing, masks.target_packing, masks.predictor_packing,
                    masks.target_union_packing)  # fmt: skip
        totals.append([packing.capacity for packing in packings])
    shares = np.linspace(0, 1, count + 1)[1:]
    levels = np.quantile(totals, shares, axis=0, method="higher")
    sampler.capacities = [
        MaskSizes(**dict(zip(names, map(int, level), strict=True))) for level in levels
    ]
    return sampler


def make_trainer(config=CONFIG, seed=0, **settings):
    torch.manual_seed(seed)
    return Trainer(IJEPA(config), OptimConfig(), SCHEDULE, **settings)


def make_images(step):
    shape = (BATCH, 3, *CONFIG.image_size)
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def draw(sampler, step):
    return sampler(keys=derive_keys(5, step, np.arange(BATCH)))


def with_backend(trainer, backend):
    """The trainer's own compiled function by another backend."""
    trainer._gradients.loss = torch.compile(
        trainer.model.forward, fullgraph=True, dynamic=False, backend=backend
    )


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_one_graph_a_capacity_over_fifty_steps():
    """Everything of the step that may change does: masks, redraws, and uses of the target encoder
    at other batch sizes in between, as the collapse panel makes."""
    sampler = capacity_sampler(3)
    compiled, eager = make_trainer(compile=True), make_trainer()
    with_backend(compiled, "aot_eager")
    layouts = set()
    for step in range(STEPS):
        masks = replace(draw(sampler, step), redraws=step % 3, fallbacks=step % 2)
        layouts.add(layout_of(masks))
        images = make_images(step)
        found, expected = compiled.step(images, masks), eager.step(images, masks)
        torch.testing.assert_close(found.loss, expected.loss, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.grad_norm, expected.grad_norm, atol=1e-4, rtol=1e-3)
        if step % 20 == 10:
            compiled.model.target_encoder(images[: 1 + step // 20])
    assert 2 <= len(layouts) <= 3
    assert counters["stats"]["unique_graphs"] == len(layouts)
    assert not counters["graph_break"]
    assert set(compiled.model.state_dict()) == set(IJEPA(CONFIG).state_dict())


def test_the_default_backend_computes_the_eager_losses():
    sampler = capacity_sampler(1)
    config = replace(CONFIG, depth=1, predictor_depth=1, target="pixels")
    compiled, eager = make_trainer(config, compile=True), make_trainer(config)
    for step in range(5):
        masks, images = draw(sampler, step), make_images(step)
        found, expected = compiled.step(images, masks), eager.step(images, masks)
        torch.testing.assert_close(found.loss, expected.loss, atol=1e-4, rtol=0)
    assert counters["stats"]["unique_graphs"] == 1
    for (name, a), b in zip(
        compiled.model.state_dict().items(), eager.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-2, msg=name)


class NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (
            torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero
        ):  # fmt: skip
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_host_read_in_a_step(precision, monkeypatch):
    """Meta tensors take the path of CUDA tensors: the same ops, their kernels not launched."""

    def refuse(tensor):
        raise AssertionError("tolist waits for the device")

    masks = draw(capacity_sampler(1), 0)
    model, images = IJEPA(CONFIG).to("meta"), make_images(0).to("meta")
    model.prepare(BATCH)
    masks = masks.to("meta")
    monkeypatch.setattr(torch.Tensor, "tolist", refuse)
    with NoHostReads():
        denominator = model.count_elements(masks).clamp(min=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(images, masks, denominator)
        loss.backward()
    assert loss.shape == () and model.predictor.mask_token.grad is not None
    with pytest.raises(AssertionError, match="waits"), NoHostReads():
        torch.ones(1).item()


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_no_synchronisation_on_a_gpu(compiled):
    sampler = capacity_sampler(1)
    trainer = gpu_trainer(compile=compiled)
    batches = [(make_images(s).cuda(), draw(sampler, s).to("cuda")) for s in range(6)]
    for images, masks in batches[:3]:
        trainer.step(images, masks)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for images, masks in batches[3:]:
            trainer.step(images, masks)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def gpu_trainer(**settings):
    torch.manual_seed(0)
    config = replace(CONFIG, width=32, predictor_width=16)
    return Trainer(IJEPA(config).cuda(), OptimConfig(), SCHEDULE, **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-params"])
@pytest.mark.parametrize("compiled", [False, True])
def test_replayed_steps_equal_launched_ones(precision, compiled):
    sampler = capacity_sampler(2)
    plain = gpu_trainer(precision=precision, compile=compiled)
    replayed = gpu_trainer(precision=precision, compile=compiled, cuda_graph=True)
    for step in range(20):
        images, masks = make_images(step).cuda(), draw(sampler, step).to("cuda")
        found, expected = replayed.step(images, masks), plain.step(images, masks)
        torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)
    assert 1 <= len(replayed._replayed._recordings) <= 2
    for (name, a), b in zip(replayed.weights().items(), plain.weights().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=name)


def test_a_recording_is_fed_every_input():
    """A stand-in for the graph repeats the step on the recorded tensors: all inputs must reach
    them, each layout has its own, and the loss that is returned stays."""
    recordings = []

    def record(function):
        with torch.no_grad():
            loss = torch.full((), float("nan"))
        recordings.append(function)
        return (lambda: loss.copy_(function().detach())), loss

    sampler = capacity_sampler(2)
    plain, replayed = make_trainer(), make_trainer()
    uploads = []
    step_of = CapturedStep(
        lambda images, masks: replayed._update([images], [masks]),
        lambda: uploads.append(1),
        record,
    )
    replayed._replayed = step_of
    losses = []
    for step in range(16):
        images, masks = make_images(step), draw(sampler, step)
        expected = plain.step(images, masks)
        losses.append((replayed.step(images, masks).loss, expected.loss.clone()))
        for tensor in (images, *tensors_of(masks)):
            tensor.zero_()  # the loader may reuse them
    for found, expected in losses:
        assert torch.equal(found, expected)
    layouts = len(step_of._seen)
    assert layouts == 2 and len(recordings) == layouts
    assert len(uploads) == 16 - WARM_UP_STEPS * layouts


def test_cuda_graphs_need_a_gpu():
    with pytest.raises(ValueError, match="cuda_graph needs a model on a CUDA device"):
        make_trainer(cuda_graph=True)


def test_bfloat16_weights_follow_their_masters():
    sampler = MultiBlockSampler(CONFIG.grid)
    trainer, exact = make_trainer(precision="bf16-params"), make_trainer()
    start = copy.deepcopy(exact.model.state_dict())
    for name, tensor in trainer.weights().items():
        assert torch.equal(tensor, start[name]), name  # masters start at the unrounded weights
    for step in range(12):
        images, masks = make_images(step), draw(sampler, step)
        found, expected = trainer.step(images, masks), exact.step(images, masks)
        torch.testing.assert_close(found.loss, expected.loss, atol=0.02, rtol=0.02)
    rounded = 0
    for name, weight in trainer.model.state_dict().items():
        master = trainer.weights()[name]
        assert master.dtype == torch.float32
        assert torch.equal(weight, master.to(weight.dtype)), name
        rounded += weight.dtype == torch.bfloat16
        if "pos_embed" in name:
            assert weight.dtype == torch.float32
    assert rounded > 50
    average = trainer.weights()["target_encoder.norm.weight"]
    assert not torch.equal(average, average.bfloat16().float())  # masters move in finer steps

    resumed = make_trainer(precision="bf16-params", seed=1)
    resumed.model.load_state_dict(trainer.weights())
    resumed.load_state_dict(copy.deepcopy(trainer.state_dict()))
    images, masks = make_images(99), draw(sampler, 99)
    assert torch.equal(resumed.step(images, masks).loss, trainer.step(images, masks).loss)
    for name, tensor in trainer.weights().items():
        assert torch.equal(tensor, resumed.weights()[name]), name


def test_micro_batches_of_bfloat16_weights_add_up_in_float32():
    sampler = MultiBlockSampler(CONFIG.grid)
    trainer = make_trainer(precision="bf16-params")
    batches = [(make_images(s), draw(sampler, s)) for s in range(3)]
    trainer.step([images for images, _ in batches], [masks for _, masks in batches])
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    assert gradients and all(gradient.dtype == torch.float32 for gradient in gradients)


@pytest.mark.parametrize(
    ("precision", "residual", "expected"),
    [
        ("fp32", "bf16", torch.float32),
        ("bf16", "fp32", torch.float32),
        ("bf16", "bf16", torch.bfloat16),
        ("bf16-params", "fp32", torch.float32),
        ("bf16-params", "bf16", torch.bfloat16),
    ],
)
def test_dtype_of_the_residual_stream(precision, residual, expected):
    trainer = make_trainer(replace(CONFIG, residual=residual), precision=precision)
    seen = set()
    for module in (
        *trainer.model.context_encoder.blocks,
        *trainer.model.predictor.predictor_blocks,
    ):
        module.register_forward_hook(lambda _module, inputs, output: seen.add(output.dtype))
    result = trainer.step(make_images(0), draw(MultiBlockSampler(CONFIG.grid), 0))
    assert seen == {expected}
    assert result.loss.dtype == torch.float32 and torch.isfinite(result.loss)
