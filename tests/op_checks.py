"""What the tests of the token ops share: random packings, poisoned buffers, an error budget."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import overload

import torch
from hypothesis import strategies as st
from masked_vit_kernels.packing import Packing, pack_lengths
from torch import Tensor

# What a correct result may differ by from float64 besides twice the error of the same computation
# in plain PyTorch: a few roundings of a value near 1.
FLOOR = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
_CANARY = {torch.int32: -(2**30) + 7, torch.int64: -(2**30) + 7}


def assert_accurate(name: str, actual: Tensor, exact: Tensor, eager: Tensor | None = None) -> None:
    """Hold `actual` to float64 `exact`: twice the eager error plus a floor for its dtype."""
    assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)} != {tuple(exact.shape)}"
    assert not actual.isnan().any(), f"{name} holds NaN"
    if exact.numel() == 0:
        return
    error = (actual.double().cpu() - exact.cpu()).abs().max().item()
    reach = max(1.0, exact.abs().max().item())
    allowed = FLOOR[actual.dtype] * reach
    if eager is not None:
        allowed += 2 * (eager.double().cpu() - exact.cpu()).abs().max().item()
    assert error <= allowed, f"{name}: error {error:.3g} over {allowed:.3g}"


def gradients(outputs: Tensor, inputs: Sequence[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    """Gradients of `outputs`, weighted by `upstream`, for each of `inputs`.

    The reference stacks rows: where all of them are padding it depends on no input.
    """
    if not outputs.requires_grad:
        return tuple(torch.zeros_like(x) for x in inputs)
    upstream = upstream.to(outputs.dtype)
    return torch.autograd.grad(outputs, inputs, upstream, materialize_grads=True)


def assert_repeatable_and_capturable(run: Callable[[], Sequence[Tensor]]) -> None:
    """On a GPU: `run` gives the same bits every time, and when it is replayed as a CUDA graph."""
    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))


@overload
def double(x: Tensor) -> Tensor: ...


@overload
def double(x: Tensor | None) -> Tensor | None: ...


def double(x: Tensor | None) -> Tensor | None:
    """A float64 leaf on the CPU with the values of `x`."""
    return None if x is None else x.detach().cpu().double().requires_grad_(x.requires_grad)


@overload
def leaf(x: Tensor) -> Tensor: ...


@overload
def leaf(x: Tensor | None) -> Tensor | None: ...


def leaf(x: Tensor | None) -> Tensor | None:
    """A CPU leaf of the same dtype with the values of `x`."""
    return None if x is None else x.detach().cpu().clone().requires_grad_(x.requires_grad)


@dataclass
class Poisoned:
    """A buffer that shows what was not written and what was written outside it."""

    tensor: Tensor
    _whole: Tensor
    _margin: int

    def check(self) -> Tensor:
        """The tensor, after its margins and the absence of unwritten elements were asserted."""
        flat, margin = self._whole, self._margin
        canary = _poison(flat.dtype)
        for edge in (flat[:margin], flat[-margin:]):
            intact = edge.isnan() if flat.is_floating_point() else edge == canary
            assert intact.all(), "something was written outside the output"
        unwritten = self.tensor.isnan() if flat.is_floating_point() else self.tensor == canary
        assert not unwritten.any(), f"{int(unwritten.sum())} elements were not written"
        return self.tensor


def _poison(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point else _CANARY[dtype]


def poisoned(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Poisoned:
    """An output filled with NaN (or a canary number) between margins that hold the same."""
    margin, size = 256, torch.Size(shape).numel()
    whole = torch.full((size + 2 * margin,), _poison(dtype), dtype=dtype, device=device)
    return Poisoned(whole[margin : margin + size].view(shape), whole, margin)


@dataclass
class PackedIds:
    """Token ids of S sequences and their packing, with a padded tail."""

    ids: Tensor  # (capacity,)
    packing: Packing

    @property
    def total(self) -> int:
        return int(self.packing.cu_seqlens[-1])

    def to(self, device: str) -> "PackedIds":
        return PackedIds(self.ids.to(device), self.packing.to(device))


def packed_ids(
    lengths: Sequence[int],
    num_tokens: int,
    *,
    padding: int = 3,
    unique: bool = True,
    dtype: torch.dtype = torch.int64,
) -> PackedIds:
    """Random ids below `num_tokens`; distinct within a sequence if `unique`."""
    draws = [
        torch.randperm(num_tokens)[:n] if unique else torch.randint(num_tokens, (n,))
        for n in lengths
    ]
    ids = torch.cat([*draws, torch.full((padding,), -1)]).to(dtype)
    capacity = sum(lengths) + padding
    return PackedIds(ids, pack_lengths(lengths, capacity=capacity, unique=unique))


def poison_tail(x: Tensor, total: int) -> Tensor:
    """`x` with NaN in every row from `total` on."""
    x[total:] = float("nan")
    return x


def lengths_strategy(num_tokens: int, max_sequences: int = 5) -> st.SearchStrategy[list[int]]:
    """Lengths of up to `max_sequences` sequences that fit `num_tokens`, empty ones included."""
    return st.lists(st.integers(0, num_tokens), min_size=1, max_size=max_sequences)


@contextmanager
def launches_in_place():
    """Interpreter: skip copying arguments back, which would touch all of a huge sparse buffer."""
    from triton.runtime.interpreter import GridExecutor

    original: Callable = GridExecutor._restore_args_dev
    GridExecutor._restore_args_dev = lambda *arguments: None
    try:
        yield
    finally:
        GridExecutor._restore_args_dev = original
