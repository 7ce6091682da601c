"""`ema_update_` alone, for teacher-student methods that bring their own optimiser."""

from __future__ import annotations

import pytest
import torch
from masked_vit_kernels import ema_update_, reference
from masked_vit_kernels.optimizer.ema_arguments import match_by_name
from masked_vit_kernels.optimizer.multi_tensor import TILE
from torch import nn

SHAPES = [(), (0, 3), (5,), (17, 9), (TILE + 3,)]


def make_pairs(source_dtype, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = [torch.randn(s, generator=generator).to(device) for s in SHAPES]
    sources = [torch.randn(s, generator=generator).to(device, source_dtype) for s in SHAPES]
    return targets, sources


def check_against_reference(source_dtype, momentum, device="cpu", slope=2e-7):
    targets, sources = make_pairs(source_dtype, device)
    exact = [t.double() for t in targets]
    versions = [t._version for t in targets]
    ema_update_(targets, sources, momentum)
    reference.ema_update_(exact, sources, float(momentum))
    for target, expected, version in zip(targets, exact, versions, strict=True):
        assert torch.allclose(target.double(), expected, rtol=slope, atol=slope)
        assert target._version > version


@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996, 1.0])
def test_against_float64(source_dtype, momentum):
    check_against_reference(source_dtype, momentum)
    check_against_reference(source_dtype, torch.tensor(momentum, dtype=torch.float64))


def test_buffers_wide_targets_and_other_layouts():
    targets = [torch.tensor(3), torch.zeros(2, dtype=torch.bool), torch.ones(3).double()]
    sources = [torch.tensor(7), torch.ones(2, dtype=torch.bool), torch.zeros(3)]
    transposed, strided = torch.ones(4, 3).t(), torch.ones(6, 4)[:, ::2]
    targets += [transposed, strided]
    sources += [torch.zeros(3, 4), torch.zeros(6, 2)]
    ema_update_(targets, sources, 0.75)
    assert int(targets[0]) == 7 and bool(targets[1].all())
    for target in targets[2:]:
        assert torch.equal(target, torch.full_like(target, 0.75))


def test_a_momentum_next_to_one_is_not_rounded():
    target, source = torch.zeros(4, dtype=torch.float64), torch.ones(4)
    ema_update_([target], [source], 0.999999)
    assert torch.allclose(target, torch.full_like(target, 1e-6), rtol=1e-9)
    target = torch.zeros(4)
    ema_update_([target], [source], 0.999999)
    assert torch.allclose(target, torch.full_like(target, 1e-6), rtol=1e-6)


def test_what_is_refused():
    for targets, sources, message in (
        ([torch.zeros(2)], [], "1 targets cannot be averaged with 0 sources"),
        ([torch.zeros(2)], [torch.zeros(3)], "must have one shape"),
        ([torch.zeros(2, dtype=torch.bfloat16)], [torch.zeros(2)], "would not move"),
        ([torch.zeros(2)], [torch.zeros(2, device="meta")], "source on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            ema_update_(targets, sources, 0.5)


@pytest.mark.parametrize(
    ("targets", "sources", "error", "message"),
    [
        ({"a": torch.zeros(2)}, {"a": torch.zeros(2)}, TypeError, "targets must be .* got a dict"),
        (nn.Linear(2, 2), [torch.zeros(2)], TypeError, "targets must be .* got a module"),
        ([torch.zeros(2)], nn.Linear(2, 2), TypeError, "sources must be .* got a module"),
        ([nn.Linear(2, 2)], [nn.Linear(2, 2)], TypeError, r"targets\[0\] must be a tensor"),
        (3, 4, TypeError, "targets must be a list of tensors, got a int"),
        (
            [torch.zeros(2, device="meta")],
            [torch.zeros(2, device="meta")],
            ValueError,
            "pair 0: tensors on the meta device hold no values",
        ),
        (nn.Linear(2, 2), nn.Linear(2, 2, bias=False), ValueError, r"only one of .*'bias'"),
    ],
)
def test_other_things_than_tensors_are_refused_in_words(targets, sources, error, message):
    with pytest.raises(error, match=message):
        ema_update_(targets, sources, 0.5)


@pytest.mark.parametrize("momentum", [float("nan"), 1.5, -0.1, torch.tensor(torch.nan)])
def test_a_momentum_that_is_none_changes_nothing(momentum):
    """NaN once became the value of every average."""
    targets, counter = [torch.zeros(3), torch.zeros(2)], torch.tensor(1)
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\], got "):
        ema_update_([counter, *targets], [torch.tensor(2), torch.ones(3), torch.ones(2)], momentum)
    with pytest.raises(ValueError, match="pair 2: target"):
        ema_update_([counter, *targets], [torch.tensor(2), torch.ones(3), torch.ones(5)], 0.5)
    assert counter == 1 and not torch.cat(targets).any()
    with pytest.raises(TypeError, match="momentum must be a float or a 0-d tensor, got a NoneType"):
        ema_update_(targets, targets, None)


def test_two_modules_are_averaged_by_name():
    target, source = (nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)) for _ in range(2))
    source[1].num_batches_tracked.fill_(7)
    expected = [0.75 * t.detach() + 0.25 * s.detach() for t, s in zip(
        target.parameters(), source.parameters(), strict=True)]  # fmt: skip
    ema_update_(target, source, 0.75)
    for tensor, mean in zip(target.parameters(), expected, strict=True):
        torch.testing.assert_close(tensor.detach(), mean)
    assert target[1].num_batches_tracked == 7


def test_modules_are_matched_by_name_or_refused():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self._orig_mod = inner

    target, source = (nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)) for _ in range(2))
    pairs = match_by_name(target, Wrapper(source))
    assert len(pairs) == 7  # four parameters and three buffers
    named = dict(target.named_parameters())
    sources = dict(source.named_parameters())
    by_id = {id(t): s for t, s in pairs}
    assert all(by_id[id(named[name])] is sources[name] for name in named)
    with pytest.raises(ValueError, match=r"only one of target and source.*1\.bias"):
        match_by_name(target, nn.Sequential(nn.Linear(2, 3)))


@pytest.mark.interpreter
@pytest.mark.parametrize("source_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("on_device", [False, True])
def test_the_interpreted_kernel(source_dtype, on_device):
    for momentum in (0.3, 0.996):
        value = torch.tensor(momentum, dtype=torch.float64) if on_device else momentum
        check_against_reference(source_dtype, value)


@pytest.mark.interpreter
def test_interpreted_layouts_and_moved_tensors():
    for _ in range(2):  # the second round finds other tensors, perhaps at the same addresses
        strided = torch.ones(6, 4)[:, ::2]
        misaligned = torch.ones(TILE + 1)[1:]
        targets = [strided, misaligned]
        ema_update_(targets, [torch.zeros(6, 2), torch.zeros(TILE)], 0.75)
        assert all(torch.equal(t, torch.full_like(t, 0.75)) for t in targets)


@pytest.mark.gpu
@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(source_dtype):
    for momentum in (0.0, 0.3, 0.996, 1.0):
        check_against_reference(source_dtype, momentum, device="cuda")
        value = torch.tensor(momentum, dtype=torch.float64, device="cuda")
        check_against_reference(source_dtype, value, device="cuda")
