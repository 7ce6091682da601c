"""AdamWEMA on the CPU: against float64, against torch's AdamW, and as an ordinary optimiser."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from masked_vit_kernels import AdamWEMA, reference
from masked_vit_kernels.optimizer import cpu as adamw_ema_cpu
from torch import nn

SHAPES = [(), (3,), (0, 4), (5, 7), (2, 3, 4, 4), (150, 130)]
LR, DECAY, MOMENTUM = 3e-3, 0.1, 0.99


@pytest.fixture(autouse=True)
def small_tensors_take_the_compiled_update(monkeypatch):
    monkeypatch.setattr(adamw_ema_cpu, "COMPILED_MIN_NUMEL", 16384)


def make_parameters(seed: int, dtype=torch.float32, shapes=SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def make_targets(parameters, dtype=None) -> list[torch.Tensor]:
    return [(p.detach() + 0.25).to(dtype or p.dtype) for p in parameters]


def set_gradients(parameters, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors])


def groups_of(parameters) -> list[dict]:
    """The first half is decayed, the second half has its own learning rate."""
    half = len(parameters) // 2
    return [
        {"params": parameters[:half], "weight_decay": DECAY},
        {"params": parameters[half:], "weight_decay": 0.0, "lr": 2 * LR},
    ]


class Float64Oracle:
    """`reference.adamw_ema_step` on float64 copies, group by group."""

    def __init__(self, parameters, targets):
        self.parameters = [p.detach().double() for p in parameters]
        self.targets = [t.double() for t in targets]
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]
        self.steps = [0] * len(parameters)

    def step(self, gradients, momentum=MOMENTUM) -> None:
        half = len(self.parameters) // 2
        for part, lr, decay in (
            (slice(None, half), LR, DECAY),
            (slice(half, None), 2 * LR, 0.0),
        ):
            steps = self.steps[part]
            reference.adamw_ema_step(
                self.parameters[part],
                gradients[part],
                self.moments[part],
                self.targets[part],
                steps,
                lr=lr,
                weight_decay=decay,
                momentum=momentum,
            )
            self.steps[part] = steps


@pytest.mark.parametrize("compiled", [False, True])
def test_200_steps_stay_near_float64(compiled):
    """Norm-wise error at most twice that of torch's own float32 AdamW and foreach lerp."""
    ours, torchs = make_parameters(0), make_parameters(0)
    targets, torch_targets = make_targets(ours), make_targets(ours)
    oracle = Float64Oracle(ours, targets)
    optimizer = AdamWEMA(
        groups_of(ours),
        lr=LR,
        ema=list(zip(targets, ours, strict=True)),
        momentum=MOMENTUM,
        compile_on_cpu=compiled,
    )
    stock = torch.optim.AdamW(groups_of(torchs), lr=LR)
    if compiled:
        assert adamw_ema_cpu.compiler_exists()
        assert max(p.numel() for p in ours) >= adamw_ema_cpu.COMPILED_MIN_NUMEL
    for step in range(200):
        set_gradients(ours, step + 100)
        for a, b in zip(ours, torchs, strict=True):
            b.grad = a.grad.clone()
        optimizer.step(loss=torch.tensor(1.0))
        stock.step()
        torch._foreach_lerp_(torch_targets, [p.detach() for p in torchs], 1 - MOMENTUM)
        oracle.step([p.grad for p in ours])
    for mine, theirs, exact in (
        (ours, torchs, oracle.parameters),
        (targets, torch_targets, oracle.targets),
    ):
        error = (flat(mine) - flat(exact)).norm()
        stock_error = (flat(theirs) - flat(exact)).norm()
        assert error <= 2 * stock_error + 1e-7 * flat(exact).norm(), (error, stock_error)
    assert [int(optimizer.state[p]["step"]) for p in ours] == [200] * len(ours)
    assert not compiled or adamw_ema_cpu.OnePass.shared().works


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996, 0.999999, 1.0])
def test_targets_move_by_the_exact_lerp_of_the_updated_parameters(momentum):
    parameters = make_parameters(1)
    targets = make_targets(parameters)
    before = [t.clone() for t in targets]
    optimizer = AdamWEMA(
        parameters, lr=LR, ema=list(zip(targets, parameters, strict=True)), momentum=momentum
    )
    set_gradients(parameters, 5)
    optimizer.step()
    for old, new, p in zip(before, targets, parameters, strict=True):
        exact = torch.lerp(old.double(), p.detach().double(), 1 - momentum)
        assert torch.allclose(new.double(), exact, rtol=2e-7, atol=1e-7)
        moved = (new.double() - old.double()).norm()
        expected = (1 - momentum) * (p.detach().double() - old.double()).norm()
        assert abs(moved - expected) <= 1e-3 * expected + 3e-7 * old.double().norm()


@pytest.mark.parametrize("bad", ["inf gradient", "nan gradient", "nan loss", "inf loss"])
def test_a_step_that_is_not_finite_touches_nothing(bad):
    parameters = make_parameters(2)
    targets = make_targets(parameters)
    optimizer = AdamWEMA(parameters, lr=LR, ema=list(zip(targets, parameters, strict=True)))
    set_gradients(parameters, 6)
    optimizer.step(loss=torch.tensor(0.5))
    tensors = [*parameters, *targets]
    tensors += [v for p in parameters for v in optimizer.state[p].values()]
    before = [t.detach().clone() for t in tensors]
    set_gradients(parameters, 7)
    loss = torch.tensor(0.5)
    if "gradient" in bad:
        parameters[-1].grad.view(-1)[-1] = float(bad.split()[0])
    else:
        loss = torch.tensor(float(bad.split()[0]))
    optimizer.step(loss=loss)
    assert bool(optimizer.skipped) and int(optimizer.skip_count) == 1
    for old, new in zip(before, tensors, strict=True):
        assert torch.equal(old, new)
    set_gradients(parameters, 8)
    optimizer.step(loss=torch.tensor(0.5))
    assert not bool(optimizer.skipped) and int(optimizer.skip_count) == 1
    assert int(optimizer.state[parameters[0]]["step"]) == 2


@pytest.mark.parametrize("scale", [1e-4, 10.0])
def test_clipping_is_clip_grad_norm(scale):
    ours, theirs = make_parameters(3), make_parameters(3)
    optimizer = AdamWEMA(ours, lr=LR, eps=1e-2, max_grad_norm=1.0)
    stock = torch.optim.AdamW(theirs, lr=LR, eps=1e-2)
    for step in range(3):
        set_gradients(ours, step, scale)
        for a, b in zip(ours, theirs, strict=True):
            b.grad = a.grad.clone()
        kept = [p.grad.clone() for p in ours]
        optimizer.step()
        norm = nn.utils.clip_grad_norm_(theirs, 1.0)
        stock.step()
        assert torch.allclose(optimizer.grad_norm, norm, rtol=1e-5)
        assert all(torch.equal(p.grad, k) for p, k in zip(ours, kept, strict=True))
    assert torch.allclose(flat(ours), flat(theirs), rtol=1e-6, atol=1e-7)


def test_state_exchange_with_torch_both_ways():
    ours, theirs = make_parameters(4), make_parameters(4)
    mine, stock = AdamWEMA(ours, lr=LR), torch.optim.AdamW(theirs, lr=LR)
    for step in range(6):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        mine.step()
        stock.step()
        if step in (1, 3):  # swap the states, twice
            a, b = copy.deepcopy(mine.state_dict()), copy.deepcopy(stock.state_dict())
            mine.load_state_dict(b)
            stock.load_state_dict(a)
    assert torch.allclose(flat(ours), flat(theirs), rtol=1e-6, atol=1e-7)
    assert float(stock.state[theirs[0]]["step"]) == float(mine.state[ours[0]]["step"]) == 6
    with pytest.raises(ValueError, match="amsgrad"):
        mine.load_state_dict(torch.optim.AdamW(theirs, amsgrad=True).state_dict())


@pytest.mark.parametrize("compiled", [False, True])
def test_bfloat16_weights_follow_their_masters(compiled):
    """Weights are the rounded masters, and the masters are what float32 training would hold."""
    exact = make_parameters(5)
    for p in exact:
        p.data = p.data.bfloat16().float()
    low = [nn.Parameter(p.detach().bfloat16()) for p in exact]
    exact_targets, low_targets = make_targets(exact), make_targets(low)
    for exact_target, low_target in zip(exact_targets, low_targets, strict=True):
        exact_target.copy_(low_target)
    pairs = list(zip(low_targets, low, strict=True))
    optimizer = AdamWEMA(low, lr=1e-4, ema=pairs, compile_on_cpu=compiled)
    wide = AdamWEMA(exact, lr=1e-4, ema=list(zip(exact_targets, exact, strict=True)))
    for step in range(20):
        set_gradients(low, step)
        for a, b in zip(low, exact, strict=True):
            b.grad = a.grad.float()
        optimizer.step()
        wide.step()
    for p, e in [*zip(low, exact, strict=True), *zip(low_targets, exact_targets, strict=True)]:
        assert optimizer.master(p).dtype == torch.float32
        assert torch.allclose(optimizer.master(p), e, rtol=1e-6, atol=1e-7)
        assert torch.equal(p.detach(), optimizer.master(p).bfloat16())

    restored_weights = [nn.Parameter(p.detach().clone()) for p in low]
    restored = AdamWEMA(
        restored_weights,
        lr=1e-4,
        ema=[(t.clone(), p) for t, p in zip(low_targets, restored_weights, strict=True)],
    )
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, r in zip(low, restored_weights, strict=True):
        for name, value in optimizer.state[p].items():
            assert restored.state[r][name].dtype == torch.float32
            assert torch.equal(restored.state[r][name], value), name


@pytest.mark.parametrize("compiled", [False, True])
def test_float32_gradients_of_bfloat16_parameters(compiled):
    p = nn.Parameter(torch.ones(20000, dtype=torch.bfloat16))
    p.grad_dtype = torch.float32
    p.grad = torch.full((20000,), 1 + 2**-12)  # rounds to 1 in bfloat16
    optimizer = AdamWEMA([p], lr=LR, compile_on_cpu=compiled)
    optimizer.step()
    expected = torch.full((20000,), 0.1) * (1 + 2**-12)
    assert torch.allclose(optimizer.state[p]["exp_avg"], expected, rtol=1e-6)
    assert not compiled or adamw_ema_cpu.OnePass.shared().works


def test_layouts_that_are_not_contiguous():
    """Channels-last, transposed and strided parameters, gradients and targets of other strides."""
    base = torch.randn(6, 8)
    parameters = [
        nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(7, 9).t()),
        nn.Parameter(base[:, ::2]),
        nn.Parameter(torch.randn(4, 6)),
    ]
    plain = [nn.Parameter(p.detach().clone().contiguous()) for p in parameters]
    targets = [torch.randn(p.shape[::-1]).permute(*reversed(range(p.ndim))) for p in parameters]
    plain_targets = [t.clone().contiguous() for t in targets]
    untouched = base[:, 1::2].clone()
    pairs = list(zip(targets, parameters, strict=True))
    optimizer = AdamWEMA(parameters, lr=LR, ema=pairs)
    stock = torch.optim.AdamW(plain, lr=LR)
    for step in range(3):
        for p, q in zip(parameters, plain, strict=True):
            q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(step))
            p.grad = q.grad.clone()
        parameters[3].grad = plain[3].grad.t().contiguous().t()
        optimizer.step()
        stock.step()
        torch._foreach_lerp_(plain_targets, [p.detach() for p in plain], 1 - 0.996)
    assert torch.allclose(flat(parameters), flat(plain), rtol=1e-6, atol=1e-7)
    assert torch.allclose(flat(targets), flat(plain_targets), rtol=1e-6, atol=1e-7)
    assert torch.equal(base[:, 1::2], untouched)


def test_missing_gradients_frozen_sources_and_added_groups():
    parameters = make_parameters(6, shapes=[(4, 3), (5,), (6,)])
    frozen = torch.randn(7, dtype=torch.bfloat16)
    targets = [*make_targets(parameters), frozen.clone() + 1]
    before = [t.clone() for t in targets]
    optimizer = AdamWEMA(parameters[:2], lr=LR, momentum=0.5)
    optimizer.add_ema_pairs(
        list(zip(targets, [*parameters[:2], parameters[2], frozen], strict=True))
    )
    set_gradients(parameters[:1], 1)  # the second has none, the third is not optimised yet
    old = parameters[1].detach().clone()
    optimizer.step()
    assert torch.equal(parameters[1], old) and int(optimizer.state[parameters[1]]["step"]) == 0
    sources = [*parameters, frozen]
    for target, source, was in zip(targets, sources, before, strict=True):
        expected = 0.5 * was.float() + 0.5 * source.detach().float()
        assert torch.allclose(target.float(), expected.to(target.dtype).float(), atol=1e-6)
    master = optimizer.master(targets[3])
    assert master.dtype == torch.float32 and torch.equal(master.bfloat16(), targets[3])

    optimizer.add_param_group({"params": [parameters[2]], "lr": 1.0})
    set_gradients(parameters, 2)
    old = parameters[2].detach().clone()
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in parameters] == [2, 1, 1]
    assert (parameters[2].detach() - old).abs().min() > 0.5  # a first step moves by about lr


def test_parameters_that_moved_in_memory():
    parameters = make_parameters(7, shapes=[(4, 3), (5,)])
    twin = make_parameters(7, shapes=[(4, 3), (5,)])
    optimizer, stock = AdamWEMA(parameters, lr=LR), torch.optim.AdamW(twin, lr=LR)
    for step in range(3):
        set_gradients(parameters, step)
        set_gradients(twin, step)
        optimizer.step()
        stock.step()
        for p in parameters:
            p.data = p.data.clone()
    assert torch.allclose(flat(parameters), flat(twin), rtol=1e-6, atol=1e-7)


def test_schedulers_pickling_closures_and_version_counters():
    parameters = make_parameters(8, shapes=[(4, 3), (5,)])
    targets = make_targets(parameters)
    optimizer = AdamWEMA(parameters, lr=0.1, ema=list(zip(targets, parameters, strict=True)))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    versions = [t._version for t in [*parameters, *targets]]

    def closure():
        optimizer.zero_grad()
        loss = sum((p * p).sum() for p in parameters)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert optimizer.step(closure) < first
    assert all(t._version > v for t, v in zip([*parameters, *targets], versions, strict=True))
    optimizer.zero_grad()
    assert all(p.grad is None for p in parameters)
    with pytest.raises(TypeError, match="by name"):
        optimizer.step(first)

    for twin in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        copies = twin.param_groups[0]["params"]
        set_gradients(copies, 3)
        set_gradients(parameters, 3)
        twin.step()
        assert int(twin.state[copies[0]]["step"]) == 3
    optimizer.step()
    assert torch.equal(flat(copies), flat(parameters))
    assert torch.equal(flat(t for t, _ in twin._pairs), flat(targets))
    torch.save(optimizer.state_dict(), buffer := io.BytesIO())
    buffer.seek(0)
    optimizer.load_state_dict(torch.load(buffer, weights_only=True))
    assert int(optimizer.state[parameters[0]]["step"]) == 3


def test_learning_rate_and_momentum_as_tensors():
    ours, theirs = make_parameters(9), make_parameters(9)
    targets = make_targets(ours), make_targets(ours)
    by_tensor = AdamWEMA(
        ours,
        lr=torch.tensor(LR, dtype=torch.float64),
        ema=list(zip(targets[0], ours, strict=True)),
        momentum=torch.tensor(0.9, dtype=torch.float64),
    )
    by_float = AdamWEMA(theirs, lr=LR, ema=list(zip(targets[1], theirs, strict=True)), momentum=0.9)
    for step in range(2):
        for parameters, optimizer in ((ours, by_tensor), (theirs, by_float)):
            set_gradients(parameters, step)
            optimizer.step()
        by_tensor.param_groups[0]["lr"].mul_(0.5)
        by_float.param_groups[0]["lr"] *= 0.5
    assert torch.equal(flat(ours), flat(theirs))
    assert torch.equal(flat(targets[0]), flat(targets[1]))


def test_what_is_refused():
    p, q = make_parameters(10, shapes=[(4,), (5,)])
    for arguments, message in (
        ({"lr": -1.0}, "lr must not be negative"),
        ({"lr": float("nan")}, "lr must be finite, got nan"),
        ({"weight_decay": float("inf")}, "weight_decay must be finite, got inf"),
        ({"betas": (0.9,)}, r"betas must be two numbers, got \(0.9,\)"),
        ({"momentum": float("nan")}, r"momentum must lie in \[0, 1\], got nan"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must lie in \[0, 1\)"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive"),
        ({"ema": [(torch.zeros(5), p)]}, "must have one shape"),
        ({"ema": [(torch.zeros(4, dtype=torch.int64), p)]}, "must be floating"),
        ({"ema": [(torch.zeros(4), p), (torch.zeros(4), p)]}, "already paired"),
        ({"ema": [(p, torch.zeros(4))]}, "itself being optimised"),
    ):
        with pytest.raises(ValueError, match=message):
            AdamWEMA([p, q], **arguments)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        AdamWEMA([nn.Parameter(torch.zeros(3, dtype=torch.float64))])
    overlapping = nn.Parameter(torch.zeros(1).expand(3))
    overlapping.grad = torch.ones(3)
    with pytest.raises(ValueError, match="overlap in memory"):
        AdamWEMA([overlapping]).step()
    with pytest.raises(KeyError, match="neither a parameter"):
        AdamWEMA([p]).master(torch.zeros(4, dtype=torch.bfloat16))


@pytest.mark.parametrize("fault", ["no compiler", "broken compiler"])
def test_step_where_nothing_compiles(fault, monkeypatch):
    if fault == "no compiler":
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CXX", raising=False)
        assert not adamw_ema_cpu.compiler_exists()
    else:

        def fail(*operands):
            raise RuntimeError("no such header")

        one_pass = adamw_ema_cpu.OnePass()
        one_pass._function = fail
        monkeypatch.setattr(adamw_ema_cpu.OnePass, "shared", lambda: one_pass)
    ours, theirs = make_parameters(11), make_parameters(11)
    optimizer, stock = AdamWEMA(ours, lr=LR, compile_on_cpu=True), torch.optim.AdamW(theirs, lr=LR)
    for parameters in (ours, theirs):
        set_gradients(parameters, 0)
    if fault == "no compiler":
        optimizer.step()
    else:
        with pytest.warns(UserWarning, match="no such header"):
            optimizer.step()
    stock.step()
    assert torch.allclose(flat(ours), flat(theirs), rtol=1e-6, atol=1e-7)


def test_two_modules_are_paired_by_name():
    source, target = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    optimizer = AdamWEMA(source.parameters(), lr=LR, ema=(target, source), momentum=0.5)
    source[1].running_mean.fill_(2.0)
    before = [tensor.detach().clone() for tensor in target.parameters()]
    set_gradients(list(source.parameters()), 0)
    optimizer.step()
    for old, new, moved in zip(before, target.parameters(), source.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), 0.5 * old + 0.5 * moved.detach())
    assert target[1].running_mean.tolist() == [1.0] * 4
    assert target[1].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("ema", "error", "message"),
    [
        ({"a": torch.zeros(2)}, TypeError, "ema must be a list of .* got a dict"),
        (nn.Linear(2, 2), TypeError, "ema must be a list of .* got a module"),
        ([nn.Linear(2, 2)], TypeError, r"ema pair 0 must be \(target, source\), got a module"),
        ([(torch.zeros(2), "x")], TypeError, r"ema pair 0\[1\] must be a tensor, got a str"),
        ((nn.Linear(2, 2), nn.Linear(2, 2, bias=False)), ValueError, "'bias'"),
    ],
)
def test_averages_of_other_things_are_refused_in_words(ema, error, message):
    with pytest.raises(error, match=message):
        AdamWEMA(make_parameters(0), ema=ema)


@pytest.mark.parametrize("variant", ["amsgrad", "maximize", "differentiable"])
def test_variants_of_adamw_are_refused_in_words(variant):
    with pytest.raises(ValueError, match=f"AdamWEMA has no {variant}: leave it out"):
        AdamWEMA(make_parameters(0), **{variant: True})
    with pytest.raises(ValueError, match=f"AdamWEMA has no {variant}"):
        AdamWEMA([{"params": make_parameters(0), variant: True}])
    AdamWEMA([{"params": make_parameters(0), variant: False}], **{variant: False})


def test_what_is_done_anyway_may_be_asked_for():
    parameters, plain = make_parameters(3), make_parameters(3)
    asked = AdamWEMA(parameters, foreach=True, fused=True, capturable=True)
    silent = AdamWEMA(plain, foreach=False, fused=None)
    for optimizer, members in ((asked, parameters), (silent, plain)):
        set_gradients(members, 1)
        optimizer.step()
    assert torch.equal(flat(parameters), flat(plain))


def test_meta_tensors_are_refused_at_the_step():
    parameter = nn.Parameter(torch.zeros(3, device="meta"))
    optimizer = AdamWEMA([parameter])
    parameter.grad = torch.zeros(3, device="meta")
    with pytest.raises(ValueError, match="on the meta device and hold no values"):
        optimizer.step()
