"""What the processes of a run tell each other besides their work: who they are, that one has failed, and that one has left."""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch.distributed
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.distributed_c10d import _get_default_store

Result = TypeVar("Result")

_PATIENCE = timedelta(seconds=5)


class Notices:
    """Notices of one launch, in the store that the processes communicate by.

    The connection is one of its own, because the process group's may be waiting for a process that is gone. Until there is a
    group, and where the store cannot be reached any more, nothing is known.

    Args:
        rank: of this process.
        size: number of processes.
        launch: number of the launch, the same in all processes.
    """

    def __init__(self, rank: int, size: int, launch: int) -> None:
        self._rank, self._size, self._launch = rank, size, launch
        self._machine = _machine()
        self._store: Store | None = None
        self._joining = threading.Lock()
        self._left = self._lost = False
        self._pids: dict[int, int] = {}

    def join(self) -> None:
        """Connect, once there is a group, and say where this process is; look up those of the others that are on this machine."""
        with self._joining:
            if self._left:
                return
            if self._store is None:
                with suppress(RuntimeError, ValueError):
                    self._store = self._connected()
                self._post(f"place/{self._rank}", f"{self._machine} {os.getpid()}")
        for rank in range(self._size):
            if rank != self._rank and rank not in self._pids and (place := self._read(f"place/{rank}")) is not None:
                where, _, pid = place.rpartition(" ")
                self._pids[rank] = int(pid) if where == self._machine else 0

    def leave(self) -> None:
        """Say that this process ends, or goes on, by itself."""
        with self._joining:  # else a place could be posted afterwards, of a process that never leaves
            self._left = True
        self._post(f"left/{self._rank}", "")

    def gone(self) -> int | None:
        """Rank of a process of this machine that has ended without having left; ``None`` where none is known to have."""
        for rank, pid in list(self._pids.items()):  # to which the other thread may add
            if pid and not _runs(pid) and self._has(f"left/{rank}") is False:
                return rank
        return None

    def failures(self) -> int:
        """How many processes have failed."""
        return self._count(0) or 0

    def first_to_fail(self) -> bool | None:
        """Count this process among those that have failed; whether it is the first, ``None`` where that cannot be told."""
        count = self._count(1)
        return None if count is None else count == 1

    def _count(self, more: int) -> int | None:
        return self._asked(lambda store: store.add("failures", more))

    def _post(self, name: str, text: str) -> None:
        self._asked(lambda store: store.set(name, text))

    def _read(self, name: str) -> str | None:
        return self._asked(lambda store: store.get(name).decode()) if self._has(name) else None

    def _has(self, name: str) -> bool | None:
        return self._asked(lambda store: bool(store.check([name])))

    def _asked(self, ask: Callable[[Store], Result]) -> Result | None:
        """The store's answer; ``None`` where there is none. One that failed is asked no more: torch prints a trace each time."""
        if self._store is None or self._lost:
            return None
        try:
            return ask(self._store)
        except RuntimeError:
            self._lost = True
            return None

    def _connected(self) -> Store | None:
        if not torch.distributed.is_initialized():
            return None
        store = _get_default_store()
        while isinstance(store, PrefixStore):
            store = store.underlying_store
        if not isinstance(store, TCPStore):
            return None
        own = TCPStore(store.host, store.port, is_master=False, wait_for_workers=False, timeout=_PATIENCE)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives the processes
        return PrefixStore(f"mergekit_vision/{attempt}/{self._launch}", own)


def _machine() -> str | None:
    """What tells machines apart, and containers whose processes have numbers of their own; ``None`` where nothing does."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _runs(pid: int) -> bool:
    """Whether there is a process of this number that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
