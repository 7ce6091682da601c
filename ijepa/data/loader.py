"""Training batches as a pure function of the step.

Step s belongs to epoch s // steps_per_epoch; the epoch's order of images is a permutation keyed by
(seed, epoch); every crop and every mask is keyed by (seed, epoch, image number). Nothing depends
on which worker builds a batch, on how many workers or ranks there are, or on whether the run was
resumed.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.utils.data
from torch import Tensor

from ijepa.counter_rng import derive_keys, random_bits
from ijepa.data.batch import batch_labels, load_batch
from ijepa.data.sources import ImageSource
from ijepa.data.views import Transform
from ijepa.data.worker_deaths import WorkerDied, deaths_seen_while_waiting, is_death_of_a_worker
from ijepa.printable import printable

_ORDER_STREAM, _CROP_STREAM, _MASK_STREAM = 1, 2, 3
_PREFETCHED = 2  # batches a worker prepares ahead
_TENSORS_PER_BATCH = 8  # upper bound, for the limit of open files
_logger = logging.getLogger(__name__)


class NoSharedMemory(RuntimeError):
    """A data worker cannot hand over its batch."""


class DrawsMasks(Protocol):
    """(B,) uint64 keys -> the B masks of a batch (an `ijepa.MaskBatch`)."""

    def __call__(self, *, keys: np.ndarray) -> Any: ...


class TrainingBatch(NamedTuple):
    """What one rank sees in one step: (step, images, masks, labels).

    Attributes:
        step: number of the step, from 0.
        images: (B, C, H, W) uint8.
        masks: the mask sampler's MaskBatch.
        labels: task -> (B,) int64; empty for a source without labels.
    """

    step: int
    images: Tensor
    masks: Any
    labels: dict[str, Tensor]


@dataclass
class UnreadableImages:
    """The images met so far that could not be read.

    Attributes:
        count: distinct images.
        names: "path: reason" of the first few.
    """

    max_names: int = 20
    names: list[str] = field(default_factory=list)
    _seen: set[int] = field(default_factory=set)

    @property
    def count(self) -> int:
        return len(self._seen)

    def add(self, source: ImageSource, found: dict[int, str]) -> None:
        """Count what one batch met; name and log it while there is room."""
        for index, reason in found.items():
            if index in self._seen:
                continue
            self._seen.add(index)
            if len(self.names) < self.max_names:
                self.names.append(f"{printable(source.name(index))}: {reason}")
                _logger.warning("unreadable image replaced: %s", self.names[-1])


def build_loader(
    source: ImageSource,
    mask_sampler: DrawsMasks,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    end_step: int | None = None,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    accumulate: int = 1,
    pin_memory: bool = False,
) -> Loader:
    """A loader of `TrainingBatch`es for steps `start_step` to `end_step - 1` (None: without end).

    Args:
        batch_size: images a rank and micro-batch; rank r takes the r-th part of the global batch.
        accumulate: micro-batches a step, one `TrainingBatch` each, all with the step's number.
        num_workers: processes that decode and draw masks; 0 does it in this process.
        pin_memory: hand out page-locked memory, for asynchronous copies to a GPU.

    Raises:
        ValueError: fewer images than a global batch, or a rank outside the world.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
    if min(batch_size, accumulate) < 1 or num_workers < 0 or start_step < 0:
        raise ValueError(
            "batch_size and accumulate must be at least 1, num_workers and start_step at least 0, "
            f"got {batch_size}, {accumulate}, {num_workers}, {start_step}"
        )
    shares = world_size * accumulate
    if len(source) < batch_size * shares:
        raise ValueError(
            f"the data set has {len(source)} images, fewer than one batch of {batch_size} on each "
            f"of {world_size} ranks, {accumulate} times a step: lower batch_size to at most "
            f"{len(source) // shares}"
        )
    steps = _StepDataset(
        source, mask_sampler, transform, batch_size, seed, rank, world_size, accumulate
    )
    return Loader(steps, start_step, end_step, num_workers, pin_memory)


class Loader:
    """Iterates over the steps of a run; every `iter` starts at the first step again.

    Attributes:
        steps_per_epoch: whole global batches in the data set; the rest sits the epoch out.
        unreadable: the damaged images met so far.
    """

    def __init__(self, steps, start_step, end_step, num_workers, pin_memory):
        self._steps = steps
        self._start_step, self._end_step = start_step, end_step
        self._num_workers, self._pin_memory = num_workers, pin_memory
        self.steps_per_epoch = steps.steps_per_epoch
        self.unreadable = UnreadableImages()
        self._workers: list[multiprocessing.process.BaseProcess] = []

    def __iter__(self) -> Iterator[TrainingBatch]:
        """The batches; workers that die are replaced once.

        Raises:
            WorkerDied: for the second time.
            NoSharedMemory: workers cannot hand over what they have made.
        """
        item, replaced = self._start_step * self._steps.accumulate, False
        batches = self._start(item)
        while True:
            try:
                made = next(batches, None)
            except (RuntimeError, OSError, EOFError) as error:
                if not self._num_workers or not is_death_of_a_worker(error):
                    raise
                if replaced:
                    raise WorkerDied(
                        f"a data worker died for the second time ({error}): killed for want of "
                        "memory, or by an image? Try fewer data.workers, or 0"
                    ) from error
                _logger.warning("a data worker died (%s): new ones make its batches again", error)
                batches, replaced = self._start(item), True
                continue
            except BaseException as error:
                if not isinstance(error, Exception):  # a stop: they may hang in a dead file system,
                    self._kill_workers()  # and the end of the process would wait for them
                raise
            if made is None:
                return
            if isinstance(made, Exception):
                raise made
            item += 1
            batch, unreadable = made
            self.unreadable.add(self._steps.source, unreadable)
            yield batch

    def _start(self, item: int) -> Iterator:
        """Batches from this one on, with workers of their own."""
        before = multiprocessing.active_children()
        with signals_blocked(), deaths_seen_while_waiting():  # see start_worker
            batches = iter(self._data_loader(item))
        self._workers = [p for p in multiprocessing.active_children() if p not in before]
        return batches

    def _kill_workers(self) -> None:
        for worker in self._workers:
            worker.kill()

    def _data_loader(self, first: int) -> torch.utils.data.DataLoader:
        steps: Iterable[int] = itertools.count(first)
        if self._end_step is not None:
            steps = range(first, self._end_step * self._steps.accumulate)
        workers = self._num_workers
        if workers:
            _allow_open_files(workers * (_PREFETCHED + 1) * _TENSORS_PER_BATCH)
        return torch.utils.data.DataLoader(
            self._steps,
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            prefetch_factor=_PREFETCHED if workers else None,
            worker_init_fn=start_worker,
            pin_memory=self._pin_memory,
            # Without one of its own the DataLoader draws from, and so changes, the global state.
            generator=torch.Generator(),
        )


class _StepDataset(torch.utils.data.Dataset):
    """Item s * accumulate + a is micro-batch a of step s."""

    def __init__(
        self, source, mask_sampler, transform, batch_size, seed, rank, world_size, accumulate
    ):
        self.source = source
        self.mask_sampler = mask_sampler
        self.transform = transform
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.accumulate = accumulate
        self.global_batch = batch_size * world_size * accumulate
        self.steps_per_epoch = len(source) // self.global_batch
        self._order: tuple[int, np.ndarray] | None = None  # the last epoch's

    def __getitem__(self, item: int) -> tuple[TrainingBatch, dict[int, str]] | Exception:
        """The batch and its unreadable images, or in a worker why there is none: what a worker
        raises reaches the main process with a traceback in its text."""
        if torch.utils.data.get_worker_info() is None:
            return self._made(item)
        try:
            batch, unreadable = self._made(item)
            return in_shared_memory(batch), unreadable
        except (ValueError, NoSharedMemory) as error:
            return error

    def _made(self, item: int) -> tuple[TrainingBatch, dict[int, str]]:
        step, part = divmod(item, self.accumulate)
        epoch, position = divmod(step, self.steps_per_epoch)
        share = self.rank * self.accumulate + part
        start = position * self.global_batch + share * self.batch_size
        indices = self._epoch_order(epoch)[start : start + self.batch_size]
        crop_keys = derive_keys(self.seed, _CROP_STREAM, epoch, indices)
        batch = load_batch(self.source, indices, self.transform, crop_keys)
        masks = self.mask_sampler(keys=derive_keys(self.seed, _MASK_STREAM, epoch, indices))
        labels = batch_labels(self.source, batch)
        return TrainingBatch(step, batch.images, masks, labels), batch.unreadable

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """(n,) int64 permutation of the images."""
        if self._order is None or self._order[0] != epoch:
            key = derive_keys(self.seed, _ORDER_STREAM, epoch)
            draws = random_bits(key[None], len(self.source))[0]
            self._order = epoch, np.argsort(draws, kind="stable")
        return self._order[1]


def in_shared_memory(batch: TrainingBatch) -> TrainingBatch:
    """The batch where the main process can take it from.

    Without this it is put there by a thread of the worker's queue, which drops what finds no room,
    and the main process waits for ever.

    Raises:
        NoSharedMemory: there is no room.
    """
    share_masks = getattr(batch.masks, "in_shared_memory", lambda: batch.masks)
    try:
        return batch._replace(
            images=batch.images.share_memory_(),
            masks=share_masks(),
            labels={task: values.share_memory_() for task, values in batch.labels.items()},
        )
    except RuntimeError as error:
        raise NoSharedMemory(
            f"no room in shared memory for a batch on its way from a data worker ({error}): give "
            "/dev/shm more (docker run --shm-size=8g), or try fewer data.workers, or 0"
        ) from None


def start_worker(worker: int) -> None:
    """One thread a worker, and no say in how the run ends: the main process sees to that.

    Ctrl-C, a closed terminal and a scheduler's SIGTERM reach the whole process group. A worker that
    died of one would break the main process while it saves. But a worker must obey the SIGTERM of
    its own parent,
    which is how multiprocessing ends the workers of an iterator nobody finished; ignoring that
    one would leave the parent waiting for ever. So SIGTERM is blocked from before the fork on, in
    every thread that libraries may start, and one thread looks at who sent it.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS: there SIGTERM ends the worker
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def _obey_parent(parent: int) -> None:
    """Wait for a SIGTERM from `parent`, then end this process."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)


@contextlib.contextmanager
def signals_blocked(number: signal.Signals = signal.SIGTERM) -> Iterator[None]:
    """Keep a signal waiting in this thread and in what it starts meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _allow_open_files(needed: int) -> None:
    """Raise this process's soft limit: every tensor on its way from a worker is an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = needed + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
