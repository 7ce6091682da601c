"""`ijepa pretrain` with a fault in it: python faulty_run.py FAULT ARGUMENTS...

Every fault is the real thing at a known step: SIGKILL, SIGSTOP, a disk that is full. Which one is
said as NAME or NAME=VALUES.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from ijepa import cli
from ijepa.train import checkpoint
from ijepa.train.saving import Saving
from ijepa.train.trainer import Trainer


def kill_in_first_save() -> None:
    """SIGKILL after the tensors are written, before they are a checkpoint."""
    checkpoint.sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)


def kill_after_save(step: int) -> None:
    """SIGKILL as soon as the checkpoint of `step` is in its place."""
    save = Saving.save

    def killed(self, done):
        save(self, done)
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    mock.patch.object(Saving, "save", killed).start()


def signal_worker(number: int, *steps: int) -> None:
    """Send a signal to the first data worker once each of `steps` is done."""
    waiting = list(steps)

    def send(step: int) -> None:
        if waiting and step >= waiting[0]:
            waiting.pop(0)
            worker = multiprocessing.active_children()[0].pid
            assert worker is not None  # it runs
            os.kill(worker, number)

    _after_step(send)


def kill_rank(rank: int, step: int) -> None:
    """SIGKILL to one rank of a torchrun once `step` is done."""

    def kill(done: int) -> None:
        if done == step and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.SIGKILL)

    _after_step(kill)


def stop_worker_of_rank(rank: int, step: int) -> None:
    """SIGSTOP to the data worker of one rank."""
    if os.environ["RANK"] == str(rank):
        signal_worker(signal.SIGSTOP, step)


def fill_disk(first: int, last: int) -> None:
    """The disk of the current folder is full from the end of step `first` to that of `last`."""

    def fill(step: int) -> None:
        filler = Path("filler")
        if step == first:
            with filler.open("wb", buffering=0) as file:
                for size in (1 << 16, 1 << 12, 1):
                    try:
                        while file.write(b"x" * size):
                            pass
                    except OSError:
                        continue
        if step == last:
            filler.unlink()

    _after_step(fill)


def _after_step(action) -> None:
    take_step = Trainer.step

    def step(self, images, masks):
        result = take_step(self, images, masks)
        action(self.step_index)
        return result

    mock.patch.object(Trainer, "step", step).start()


FAULTS: dict[str, Callable[..., None]] = {
    "kill-in-first-save": kill_in_first_save,
    "kill-after-save": kill_after_save,
    "signal-worker": signal_worker,
    "kill-rank": kill_rank,
    "stop-worker-of-rank": stop_worker_of_rank,
    "fill-disk": fill_disk,
}

if __name__ == "__main__":
    name, _, values = sys.argv[1].partition("=")
    FAULTS[name](*map(int, filter(None, values.split(","))))
    sys.exit(cli.main(["pretrain", *sys.argv[2:]]))
