"""The optimiser's Triton kernels: interpreted, compiled for GPUs without one, and on a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from masked_vit_kernels import AdamWEMA, audit, reference
from masked_vit_kernels.catalogue.optimizer import optimizer_cases
from masked_vit_kernels.compile import compile_launch
from masked_vit_kernels.optimizer import adamw_ema
from masked_vit_kernels.optimizer.launches import NOT_UPLOADED, DeviceTables
from masked_vit_kernels.optimizer.multi_tensor import TILE, tile_map
from torch import nn

SHAPES = [(), (3,), (0, 4), (33, 37), (TILE + 5,)]
LR, DECAY, MOMENTUM = 3e-3, 0.1, 0.99


@pytest.fixture
def kernels_on_cpu(monkeypatch):
    """CPU tensors take the launches that CUDA tensors take."""
    monkeypatch.setattr(adamw_ema, "runs_kernels", lambda device: True)


class Problem:
    """Parameters of one dtype with targets, and the float64 oracle beside them."""

    def __init__(self, dtype=torch.float32, shapes=SHAPES, seed=0, device="cpu", **options):
        generator = torch.Generator().manual_seed(seed)
        self.generator = generator
        weights = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
        self.parameters = [nn.Parameter(w.to(device)) for w in weights]
        self.targets = [(w + 0.25).to(device) for w in weights]
        self.options = {"weight_decay": DECAY, "max_grad_norm": 1.0, "momentum": MOMENTUM}
        self.options |= options
        momentum = self.options.pop("momentum")
        pairs = list(zip(self.targets, self.parameters, strict=True))[:-1]  # the last has none
        self.optimizer = AdamWEMA(
            self.parameters, lr=LR, ema=pairs, momentum=momentum, **self.options
        )
        self.exact = [w.double() for w in weights]
        self.exact_targets = [t.cpu().double() for t in self.targets[:-1]] + [None]
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.exact]
        self.steps = [0] * len(shapes)

    def step(self, loss=None) -> tuple[float, bool]:
        """Fresh gradients, one step of both; returns the oracle's norm and decision."""
        for p in self.parameters:
            g = torch.randn(p.shape, generator=self.generator)
            p.grad = g.to(p.dtype).to(p.device)
        self.optimizer.step(loss=loss)
        return self.exact_step(loss)

    def exact_step(self, loss=None) -> tuple[float, bool]:
        return reference.adamw_ema_step(
            self.exact,
            [None if p.grad is None else p.grad.cpu() for p in self.parameters],
            self.moments,
            self.exact_targets,
            self.steps,
            lr=LR,
            momentum=float(self.optimizer.momentum),
            loss=0.0 if loss is None else float(loss),
            **self.options,
        )

    def check(self, tolerance: float) -> None:
        """Masters against float64, norm-wise; weights are the rounded masters."""
        ours = [*self.parameters, *self.targets[:-1]]
        for mine, exact in zip(ours, [*self.exact, *self.exact_targets[:-1]], strict=True):
            master = self.optimizer.master(mine).detach().cpu()
            assert torch.equal(mine.detach().cpu(), master.to(mine.dtype))
            error = (master.double() - exact).norm()
            assert error <= tolerance * exact.norm() + 1e-12, (tuple(mine.shape), error)


def stock_error(steps: int) -> float:
    """Relative error of torch's own float32 AdamW against float64 on a problem of this kind."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(1000, generator=generator)
    gradients = torch.randn(steps, 1000, generator=generator)
    results = []
    for dtype in (torch.float32, torch.float64):
        p = nn.Parameter(start.to(dtype))
        optimizer = torch.optim.AdamW([p], lr=LR, weight_decay=DECAY)
        for g in gradients:
            p.grad = g.to(dtype)
            optimizer.step()
        results.append(p.detach().double())
    return float((results[0] - results[1]).norm() / results[1].norm())


@pytest.mark.interpreter
@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, 200), (torch.float16, 5)])
def test_interpreted_steps_stay_near_float64(kernels_on_cpu, dtype, steps):
    """Norm-wise error at most twice that of torch's own float32 AdamW."""
    problem = Problem(dtype, shapes=[(), (0, 4), (11, 37)])
    for _ in range(steps):
        norm, skipped = problem.step(loss=torch.tensor(1.0))
        assert math.isclose(float(problem.optimizer.grad_norm), norm, rel_tol=1e-6)
        assert bool(problem.optimizer.skipped) == skipped is False
    problem.check(2 * stock_error(steps) + 1e-7)
    assert int(problem.optimizer.state[problem.parameters[0]]["step"]) == steps


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_full_tiles_tails_and_misaligned_gradients(kernels_on_cpu, dtype):
    problem = Problem(dtype)
    problem.step()
    for p in problem.parameters:  # the same gradients, 4 or 2 bytes off a multiple of 16
        shifted = torch.full((p.numel() + 1,), torch.nan, dtype=dtype)[1:].view(p.shape)
        p.grad = shifted.copy_(p.grad)
    problem.optimizer.step()
    problem.exact_step()
    problem.check(2 * stock_error(2) + 1e-7)


@pytest.mark.interpreter
def test_float32_gradients_missing_gradients_and_groups(kernels_on_cpu):
    problem = Problem(torch.float16)
    for round_ in range(3):
        for i, p in enumerate(problem.parameters):
            p.grad_dtype = torch.float32
            p.grad = None if (i + round_) % 2 else torch.randn(p.shape, generator=problem.generator)
        problem.optimizer.step()
        problem.exact_step()
    steps = [int(problem.optimizer.state[p]["step"]) for p in problem.parameters]
    assert steps == problem.steps
    problem.check(2 * stock_error(3) + 1e-7)


@pytest.mark.interpreter
@pytest.mark.parametrize("bad", ["inf gradient", "nan loss"])
def test_an_interpreted_step_that_is_not_finite_touches_nothing(kernels_on_cpu, bad):
    problem = Problem(shapes=[(5,), (33, 37)])
    problem.step(loss=torch.tensor(1.0))
    optimizer, last = problem.optimizer, problem.parameters[-1]
    tensors = [*problem.parameters, *problem.targets]
    tensors += [v for p in problem.parameters for v in optimizer.state[p].values()]
    before = [t.detach().clone() for t in tensors]
    value = float(bad.split()[0])
    if "gradient" in bad:
        last.grad.view(-1)[-1] = value
        optimizer.step(loss=torch.tensor(1.0))
    else:
        optimizer.step(loss=torch.tensor(value))
    assert bool(optimizer.skipped) and int(optimizer.skip_count) == 1
    for old, new in zip(before, tensors, strict=True):
        assert torch.equal(old, new)
    problem.step(loss=torch.tensor(1.0))
    assert not bool(optimizer.skipped) and int(optimizer.skip_count) == 1
    problem.check(2 * stock_error(2) + 1e-7)


@pytest.mark.interpreter
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.999999, 1.0])
def test_interpreted_targets_move_by_the_exact_lerp(kernels_on_cpu, momentum):
    problem = Problem(shapes=[(300,), (5,)], momentum=torch.tensor(momentum, dtype=torch.float64))
    old = problem.targets[0].double()
    problem.step()
    moved = problem.targets[0].double() - old
    expected = (1 - momentum) * (problem.parameters[0].detach().double() - old)
    rounding = 2.0**-24 * old.abs().max()
    # at .999999 a float32 difference 1 - momentum would be 1.3 % off
    assert (moved - expected).mean().abs() <= 1e-3 * expected.mean().abs() + rounding
    assert (moved - expected).abs().max() <= 2 * rounding + 1e-6 * expected.abs().max()


@pytest.mark.interpreter
def test_elements_beyond_2_to_31(kernels_on_cpu):
    """A slot whose base address lies 2^31 + 3 tiles before its real memory: only the last tile is
    launched, so an offset that wrapped around would fault or write elsewhere."""
    problem = Problem(shapes=[(TILE,), (1,)], momentum=0.5)
    set_all = torch.randn(TILE, generator=problem.generator)
    problem.parameters[0].grad = set_all
    optimizer = problem.optimizer
    plan = optimizer._current_plan()
    gradients = [slot.gradient() for slot in plan.slots]
    tables = optimizer._device_tables(plan, gradients)
    tables.upload(optimizer._group_values(), optimizer.momentum, optimizer.max_grad_norm)
    far_tile = 2**31 // TILE + 3
    tables.table[0, [0, 2, 3, 4]] -= 4 * far_tile * TILE
    tables.table[0, 6] = (far_tile + 1) * TILE
    column = tables.send_gradients(gradients, capturing=False)
    column[0] -= 4 * far_tile * TILE
    owner_is_first = tables.tiles[:, 0] == 0
    tables.tiles[owner_is_first, 1] = far_tile
    status = (optimizer.grad_norm, optimizer.skipped, optimizer.skip_count)
    tables.decide(column, tables.sum_squares(column), None, status)
    tables.update(column)
    problem.exact_step()
    problem.check(2 * stock_error(1) + 1e-7)


@pytest.mark.interpreter
def test_a_captured_step_whose_addresses_were_not_uploaded_is_skipped(kernels_on_cpu):
    problem = Problem(shapes=[(8,), (1,)])
    problem.step()
    before = [p.detach().clone() for p in problem.parameters]
    optimizer, tables = problem.optimizer, problem.optimizer._tables
    gradients = [slot.gradient() for slot in optimizer._plan.slots]
    column = tables.send_gradients(gradients, capturing=True)
    assert torch.equal(column, torch.full((2,), NOT_UPLOADED))
    status = (optimizer.grad_norm, optimizer.skipped, optimizer.skip_count)

    def replay():
        tables.decide(column, tables.sum_squares(column), None, status)
        tables.update(column)

    replay()
    assert bool(optimizer.skipped)
    assert all(torch.equal(p, b) for p, b in zip(problem.parameters, before, strict=True))
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.upload_hyper_parameters()
    replay()
    assert not bool(optimizer.skipped)
    assert (problem.parameters[0].detach() - before[0]).abs().max() > 0.1


def test_tile_map_covers_every_element_once():
    sizes = [5, 0, TILE, TILE + 1, 3 * TILE]
    tiles = tile_map(sizes)
    expected = [(0, 0), (2, 0), (3, 0), (3, 1), (4, 0), (4, 1), (4, 2)]
    assert tiles.tolist() == [list(pair) for pair in expected]
    assert tile_map([2**31 + 1]).shape == (2**31 // TILE + 1, 2)


def test_one_launch_each_for_a_model_of_one_precision():
    for dtype in (torch.float32, torch.bfloat16):
        problem = Problem(dtype)
        plan = problem.optimizer._current_plan()
        tables = DeviceTables(plan.slots, plan.steps, [dtype] * len(plan.slots))
        assert len(tables.buckets) == 1
        assert tables.buckets[0].num_tiles == sum(-(-s.numel // TILE) for s in plan.slots)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_200_steps_on_a_gpu(dtype):
    problem = Problem(dtype, device="cuda")
    for _ in range(200):
        problem.step(loss=torch.tensor(1.0, device="cuda"))
    problem.check(2 * stock_error(200) + 1e-7)
    assert int(problem.optimizer.skip_count) == 0


@pytest.mark.gpu
def test_three_launches_and_no_synchronisation():
    problem = Problem(torch.bfloat16, device="cuda")
    loss = torch.tensor(1.0, device="cuda")
    problem.step(loss=loss)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            problem.optimizer.step(loss=loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    names = [event.name for event in profile.events()]
    assert [name for name in names if name.endswith("_kernel")] == [
        "gradient_norm_kernel",
        "decide_kernel",
        "update_kernel",
    ]


@pytest.mark.gpu
def test_a_captured_step_follows_new_values():
    captured = Problem(device="cuda", seed=3)
    eager = Problem(device="cuda", seed=3)
    for problem in (captured, eager):
        problem.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.optimizer.step()
    for step in range(3):
        for a, b in zip(captured.parameters, eager.parameters, strict=True):
            a.grad.copy_(torch.randn_like(a))
            b.grad.copy_(a.grad)
        for problem in (captured, eager):
            problem.optimizer.param_groups[0]["lr"] = LR / (step + 1)
            problem.optimizer.momentum = 0.9 + 0.01 * step
        captured.optimizer.upload_hyper_parameters()
        graph.replay()
        eager.optimizer.step()
    for a, b in zip(
        [*captured.parameters, *captured.targets], [*eager.parameters, *eager.targets], strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_a_parameter_over_2_to_31_elements_on_a_gpu():
    size = 2**31 + 3 * TILE + 5
    if torch.cuda.mem_get_info()[0] < 12 * size:
        pytest.skip("needs 26 GB")
    p = nn.Parameter(torch.zeros(size, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.zeros_like(p)
    p.grad[-1] = 1.0
    optimizer = AdamWEMA([p], lr=1.0, weight_decay=0.0)
    optimizer.step()
    assert float(p[-1]) == pytest.approx(-1.0, rel=1e-2)
    assert int(p.count_nonzero()) == 1
    assert float(optimizer.grad_norm) == 1.0


@pytest.mark.audit
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_full_tiles_are_read_and_written_16_bytes_at_a_time(dtype):
    """Of p, m, v and the target each, one float32 load and one store of 16 bytes a trip; bfloat16
    gradients and weights go 8 bytes at a time, and nothing passes through the stack."""
    keys = {"dtype": dtype, "gradient_dtype": dtype}
    (case,) = [c for c in optimizer_cases(90) if (c.op, c.keys) == ("adamw_ema_update", keys)]
    compiled = compile_launch(*case.launches, 90)
    code = audit.disassemble(compiled.asm["cubin"])
    opcodes = [opcode for _, opcode, _ in audit.parse_instructions(code)]

    def count(prefix: str, width: str) -> int:
        return sum(opcode.startswith(prefix) and width in opcode for opcode in opcodes)

    if dtype == torch.float32:  # the gradient too
        assert (count("LDG", ".128"), count("STG", ".128")) == (5, 4)
    else:
        assert (count("LDG", ".128"), count("STG", ".128")) == (4, 4)
        assert count("STG", ".64") == 2
    assert count("LDL", "") == count("STL", "") == 0
