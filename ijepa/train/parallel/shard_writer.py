"""Checkpoints of sharded models: every rank writes its own shards, while training goes on.

`torch.distributed.checkpoint` copies the shards to the host, which is all that a step waits for,
and writes them from a thread as safetensors. The first rank then puts them together, a piece at a
time, into the two files of every other checkpoint: what opens those opens these, and they load at
any number of ranks.
"""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
    async_save,
    load,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from ijepa.disk import NotWritten
from ijepa.train import distributed
from ijepa.train.checkpoint import (
    STATE,
    WEIGHTS,
    CheckpointFolder,
    bytes_needed,
    flatten,
    make_latest,
)
from ijepa.train.parallel.assembled_file import assembled_file

_SHARDS = "shards"
_COPIES = 2  # shards and what they are put together into lie beside each other for a while


class ShardWriter:
    """Writes one checkpoint at a time; all ranks call every method together."""

    def __init__(self):
        # of its own, for its messages cross those of training
        self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None

    def start(
        self,
        run_folder: Path,
        step: int,
        weights: dict[str, Tensor],
        state: dict[str, Any],
        metadata: dict[str, Any],
    ) -> None:
        """Begin to write a checkpoint; returns when the shards are on the host.

        Args:
            weights, state: as for `save_checkpoint`, sharded tensors as DTensors.

        Raises:
            NotWritten: no room; on every rank.
        """
        tensors: dict[str, Tensor] = {}
        tree = flatten(state, "", tensors)  # names begin with /, those of weights do not
        folder = CheckpointFolder(run_folder / "checkpoints" / f"step-{step:08d}")
        needed = bytes_needed(weights) + bytes_needed(tensors)
        distributed.on_main(lambda: folder.begin(_COPIES * needed))
        files = {WEIGHTS: weights, STATE: tensors}
        shards = {
            name: tensor.detach()
            for content in files.values()
            for name, tensor in content.items()
            if isinstance(tensor, DTensor)
        }
        whole = {
            name: tensor.detach().to("cpu", copy=True)
            for content in files.values()
            for name, tensor in content.items()
            if not isinstance(tensor, DTensor)
        }
        like = {file: _without_values(content) for file, content in files.items()}
        written = async_save(
            shards,
            storage_writer=HuggingFaceStorageWriter(
                str(folder.aside / _SHARDS), save_distributed=True
            ),
            process_group=self._group,
        )
        assert isinstance(written, Future)  # as this kind of staging answers
        self._running = self._thread.submit(
            _finish, written, folder, step, like, whole, metadata, tree
        )

    def wait(self) -> None:
        """Until the checkpoint begun before is in its place.

        Raises:
            NotWritten: it could not be written; nothing of it is left. On every rank.
        """
        running, self._running = self._running, None
        if running is None:
            return
        failure = None
        try:
            running.result()
        except NotWritten as error:
            failure = error
        found = distributed.from_main(failure)  # the first rank has the last word
        if isinstance(found, NotWritten):
            raise found

    def close(self) -> None:
        """End the thread, when it is through."""
        self._thread.shutdown()


def _finish(
    written: Future,
    folder: CheckpointFolder,
    step: int,
    like: dict[str, dict[str, Tensor]],
    whole: dict[str, Tensor],
    metadata: dict[str, Any],
    tree: Any,
) -> None:
    """In the thread: wait for every rank's shards; the first rank makes a checkpoint of them."""
    try:
        written.result()
        if not distributed.is_main():
            return
        for file, tensors in like.items():
            _assemble(folder.aside / file, folder.aside / _SHARDS, tensors, whole)
        shutil.rmtree(folder.aside / _SHARDS)
        folder.seal(step, metadata, tree)
        make_latest(folder.path)
    except (OSError, CheckpointException) as error:
        raise folder.given_up(_cause(error)) from None


def _without_values(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole shapes and dtypes."""
    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in tensors.items()
    }


def _assemble(
    file: Path, shards: Path, like: dict[str, Tensor], whole: dict[str, Tensor]
) -> None:
    """Write one file from shards and from the tensors that are no shards."""
    mapped = assembled_file(file, like)
    load(
        {name: tensor for name, tensor in mapped.items() if name not in whole},
        storage_reader=HuggingFaceStorageReader(str(shards)),
        no_dist=True,
    )
    for name in mapped.keys() & whole.keys():
        mapped[name].copy_(whole[name])


def _cause(error: BaseException) -> BaseException:
    """The first rank's error of those that torch has gathered."""
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error
