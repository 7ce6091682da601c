"""One CUDA graph for each layout of a step's inputs, and copies that run beside the computation.

A layout is everything about images and masks but the values: shapes, dtypes and the host integers
of the packings. Planned capacities leave a run with at most four. The first steps of a layout run
as they are, on a side stream, and warm up compilers and libraries; the next one is recorded, and
from then on a step copies its inputs into the recorded tensors and replays.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ijepa.masks.batch import MaskBatch

WARM_UP_STEPS = 2
_UNSEEN_BY_THE_STEP = ("redraws", "fallbacks")  # counters for the log

Step = Callable[[Tensor, MaskBatch], Tensor]
Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


def tensors_of(value: object) -> list[Tensor]:
    """Every tensor in a dataclass of tensors, dataclasses and plain values, in a fixed order."""
    if isinstance(value, Tensor):
        return [value]
    if not dataclasses.is_dataclass(value):
        return []
    fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return [tensor for field in fields for tensor in tensors_of(field)]


def layout_of(value: object) -> tuple:
    """All of such a dataclass but the tensors' values, hashable."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.device)
    if not dataclasses.is_dataclass(value):
        return (value,)
    names = [field.name for field in dataclasses.fields(value)]
    return tuple(layout_of(getattr(value, n)) for n in names if n not in _UNSEEN_BY_THE_STEP)


@dataclass(frozen=True)
class _Recording:
    inputs: list[Tensor]
    replay: Callable[[], None]
    loss: Tensor

    def run(self, images: Tensor, masks: MaskBatch) -> Tensor:
        torch._foreach_copy_(self.inputs, [images, *tensors_of(masks)], non_blocking=True)
        self.replay()
        return self.loss.clone()  # the next replay overwrites it


class CapturedStep:
    """`step(images, masks) -> loss`, replayed where its layout has come up before.

    Args:
        step: a whole optimiser step without host reads; it must not keep its inputs. Its learning
            rate and the like must lie in device memory: `before_replay` writes them.
        before_replay: called before each replay.
        record: runs a function without effect and returns what repeats it, and the function's
            result, which every repetition overwrites. Default: a CUDA graph.
    """

    def __init__(
        self,
        step: Step,
        before_replay: Callable[[], None],
        record: Recorder | None = None,
    ):
        self._step, self._before_replay = step, before_replay
        self._record = record or record_cuda_graph()
        self._seen: dict[tuple, int] = {}
        self._recordings: dict[tuple, _Recording] = {}

    def __call__(self, images: Tensor, masks: MaskBatch) -> Tensor:
        """One step; the loss, 0-d."""
        layout = (layout_of(images), layout_of(masks))
        if layout not in self._recordings:
            seen = self._seen[layout] = self._seen.get(layout, 0) + 1
            if seen <= WARM_UP_STEPS:
                return _on_side_stream(self._step, images, masks)
            self._recordings[layout] = self._recorded(images, masks)
        self._before_replay()
        return self._recordings[layout].run(images, masks)

    def _recorded(self, images: Tensor, masks: MaskBatch) -> _Recording:
        images = images.clone()
        masks = masks.map_tensors(lambda tensor: tensor.clone())
        replay, loss = self._record(lambda: self._step(images, masks))
        return _Recording([images, *tensors_of(masks)], replay, loss)

    def forget(self) -> None:
        """Drop all recordings, because tensors they point to were replaced."""
        self._recordings.clear()
        self._seen.clear()


def record_cuda_graph() -> Recorder:
    """A recorder whose graphs share one memory pool: no two of them run at a time."""
    pools: list = []

    def record(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's pinning thread allocates whenever it likes
        pool = pools[0] if pools else None
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = function()
        pools.append(graph.pool())
        return graph.replay, result

    return record


def _on_side_stream(step: Step, images: Tensor, masks: MaskBatch) -> Tensor:
    """As a capture needs it: what warms up on the default stream would tie the graph to it."""
    if not images.is_cuda:
        return step(images, masks)
    side = _side_stream(images.device)
    side.wait_stream(torch.cuda.current_stream(images.device))
    with torch.cuda.stream(side):
        loss = step(images, masks)
    torch.cuda.current_stream(images.device).wait_stream(side)
    return loss


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all warm-ups: what a stream has allocated is only ever used again on that stream."""
    return torch.cuda.Stream(device)


def copied_beside(
    batches: Iterable[tuple[Tensor, MaskBatch]], device: torch.device
) -> Iterator[tuple[Tensor, MaskBatch]]:
    """Images and masks on `device`, copied on a stream of their own.

    The host runs ahead of the device, so a batch from pinned memory travels while the step before
    is still being computed.
    """
    if device.type != "cuda":
        for images, masks in batches:
            yield images.to(device), masks.to(device)
        return
    copies = torch.cuda.Stream(device)
    for images, masks in batches:
        with torch.cuda.stream(copies):
            images, masks = images.to(device, non_blocking=True), masks.to(device)
        compute = torch.cuda.current_stream(device)
        compute.wait_stream(copies)
        for tensor in (images, *tensors_of(masks)):
            tensor.record_stream(compute)  # not to be reused by the next copy while in use
        yield images, masks
