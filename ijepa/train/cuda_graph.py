"""One CUDA graph for each layout of a step's inputs.

A layout is everything about images and masks but the values: shapes, dtypes and the host integers
of the packings. Planned capacities leave a run with at most four. The first steps of a layout run
as they are, on a side stream, and warm up compilers and libraries; the next one is recorded, and
from then on a step copies its inputs into the recorded tensors and replays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ijepa.masks.batch import MaskBatch
from ijepa.masks.layout import layout_of, tensors_of

WARM_UP_STEPS = 2

Step = Callable[[Tensor, MaskBatch], Tensor]
Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


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
