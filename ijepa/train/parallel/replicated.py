"""Data parallelism with a whole model on every rank: DistributedDataParallel's own buckets.

Gradients travel while the backward pass is still running, a bucket as soon as it is full. The loss
is divided by the step's global element count, so buckets are summed, not averaged. They are summed
in float32: those of bfloat16 weights are widened on the way, together with what earlier
micro-batches left, and stay float32 for the optimiser.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ijepa.train import distributed

BUCKET_MEGABYTES = 25.0


class _LossModule(nn.Module):
    """`model` whose call is `loss`, which may be a compiled form of its forward pass."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor]):
        super().__init__()
        self.model, self._loss = model, loss

    def forward(self, *inputs) -> Tensor:
        return self._loss(*inputs)


class Replicated:
    """Every rank holds the model; see `Alone` for the methods.

    Args:
        model: its trained weights in the dtype that they keep.
        loss: (images, masks, denominator) -> 0-d loss.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor]):
        wrapped = _LossModule(model, loss)
        with warnings.catch_warnings():
            # its successor is not in every torch that is supported
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            self._ddp = DistributedDataParallel(
                wrapped,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                bucket_cap_mb=BUCKET_MEGABYTES,
            )
        self._ddp.register_comm_hook(None, self._sum)
        self.loss: Callable[..., Tensor] = self._ddp
        self._rounded = [
            parameter
            for parameter in model.parameters()
            if parameter.requires_grad and parameter.dtype != torch.float32
        ]
        self._before: dict[Tensor, Tensor] = {}  # of earlier micro-batches, float32
        self._summed: dict[Tensor, Tensor] = {}  # over the ranks, float32

    @contextlib.contextmanager
    def micro_batch(self, number: int, count: int) -> Iterator[None]:
        """Around the forward and backward pass of micro-batch `number` of `count`, from 0."""
        if number == 0:
            self._before.clear()
            self._summed.clear()
            for parameter in self._rounded:
                parameter.grad = None
                parameter.grad_dtype = parameter.dtype
        if number == count - 1:
            with distributed.collective():
                yield
            return
        with self._ddp.no_sync():
            yield
        for parameter in self._rounded:
            if parameter.grad is None:
                continue
            if parameter in self._before:
                self._before[parameter].add_(parameter.grad)
            else:
                self._before[parameter] = parameter.grad.float()
            parameter.grad = None

    def finish(self) -> None:
        """After the last one: every `.grad` is the sum over the micro-batches of all ranks."""
        for parameter, summed in self._summed.items():
            parameter.grad = None
            parameter.grad_dtype = torch.float32
            parameter.grad = summed
        self._before.clear()
        self._summed.clear()

    def _sum(self, _, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Start a bucket's all-reduce; called in the backward pass."""
        buffer = bucket.buffer()
        if buffer.dtype == torch.float32:
            work = dist.all_reduce(buffer, async_op=True)
            return work.get_future().then(lambda done: done.value()[0])
        wide = buffer.float()
        parameters = bucket.parameters()
        pieces = wide.split([parameter.numel() for parameter in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            view = piece.view_as(parameter)
            if parameter in self._before:
                view.add_(self._before.pop(parameter))
            self._summed[parameter] = view
        work = dist.all_reduce(wide, async_op=True)
        return work.get_future().then(lambda _: buffer)
