"""Which rank is gone, where a collective fails.

Every rank tells the store that torchrun keeps who and where it is, and on its way out why it goes.
A rank whose collective failed looks there for whoever left, then for processes that are no more.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator

from torch.distributed import DistError, Store

_SECONDS_TO_SHOW = 3.0  # a killed process closes its connections before it is gone
STOPPED = "stopped"
_REMEDY = "start torchrun again, with `pretrain --resume` and the run's folder"


class RankLost(RuntimeError):
    """Another rank left in the middle of the run; the message names it.

    Attributes:
        stopped: it left because it was asked to.
        ranks: the ranks that are gone.
    """

    def __init__(self, message: str, stopped: bool = False, ranks: frozenset[int] = frozenset()):
        super().__init__(message)
        self.stopped, self.ranks = stopped, ranks


class RankRegister:
    """Where ranks sign in and out."""

    def __init__(self, store: Store, rank: int, world_size: int):
        self._store, self._rank, self._world_size = store, rank, world_size
        self._host = socket.gethostname()
        store.set(f"ijepa/rank/{rank}", f"{self._host} {os.getpid()}")

    def leave(self, reason: str) -> None:
        """Tell the others why this rank ends before its time."""
        with contextlib.suppress(RuntimeError):  # the store may be gone first
            self._store.set(f"ijepa/left/{self._rank}", reason)

    @contextlib.contextmanager
    def collective(self) -> Iterator[None]:
        """Around what holds a collective operation, alone or among others as a backward pass does.

        Raises:
            RankLost: the operation failed. Errors of the others go through.
        """
        try:
            yield
        except RuntimeError as error:
            if not _of_a_connection(error):
                raise
            raise self._explained(error) from error

    def _explained(self, error: RuntimeError) -> RankLost:
        try:
            left, gone = self._absent()
        except RuntimeError:
            left, gone = {}, {0: "the rank that keeps the store"}
        if left and all(reason == STOPPED for reason in left.values()) and not gone:
            return RankLost("another rank was stopped", stopped=True)
        gone |= {rank: f"rank {rank} ({reason})" for rank, reason in left.items()}
        if gone:
            return RankLost(f"lost {', '.join(gone.values())}: {_REMEDY}", ranks=frozenset(gone))
        return RankLost(
            f"the connection to another rank broke, all ranks on {self._host} are there: look at "
            f"the other machines and the network between ({error}); then {_REMEDY}"
        )

    def _absent(self) -> tuple[dict[int, str], dict[int, str]]:
        """Ranks that signed out with their reasons, and what there is to say of processes that
        ended without."""
        deadline = time.monotonic() + _SECONDS_TO_SHOW
        while True:
            left: dict[int, str] = {}
            gone: dict[int, str] = {}
            for rank in set(range(self._world_size)) - {self._rank}:
                if self._store.check([f"ijepa/left/{rank}"]):
                    left[rank] = self._store.get(f"ijepa/left/{rank}").decode()
                    continue
                host, _, pid = self._store.get(f"ijepa/rank/{rank}").decode().rpartition(" ")
                if host == self._host and not _runs(int(pid)):
                    gone[rank] = f"rank {rank} (process {pid} on {host}, killed or crashed)"
            if left or gone or time.monotonic() > deadline:
                return left, gone
            time.sleep(0.05)


def _of_a_connection(error: RuntimeError) -> bool:
    """Whether a collective failed; gloo has no error of its own, but its messages name it."""
    words = ("gloo", "nccl", "connection", "socket", "broken pipe")
    return isinstance(error, DistError) or any(word in str(error).lower() for word in words)


def _runs(pid: int) -> bool:
    """Whether a process of this machine is there and not merely waiting to be reaped."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or a system without /proc
        return True
