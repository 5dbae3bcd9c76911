"""The processes of a run, which end together and with one message."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch.distributed.distributed_c10d import _get_default_store

from mergekit_vision.errors import FailedElsewhereError, InputError

_FAILURES = "mergekit_vision/failures"
_GRACE = 4.0  # seconds for what ends by itself
_POLL = 0.2  # seconds
_LOST = ("closed by peer", "reset by peer", "Broken pipe", "recvBytes", "sendBytes", "gloo", "NCCL")


def end_together(strategy: Strategy) -> None:
    """Have the processes that a strategy starts, or takes part in, end together; others than those of scripts do so already."""
    launcher = strategy.launcher
    if type(launcher) is _SubprocessScriptLauncher:
        strategy._launcher = Launcher(launcher.cluster_environment, launcher.num_processes, launcher.num_nodes)


class Launcher(_SubprocessScriptLauncher):
    """Starts a process for each further device, as Lightning does, and ends all when one fails.

    Lightning kills the first process without a word when another one is gone, and leaves the others to the time limit of the
    process group when the first one is. Here, the first process that fails says why; all others end in silence. Of a process
    that was killed another one says so.

    Attributes:
        children: the processes that were started.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.children: list[subprocess.Popen[bytes]] = []
        self._parent, self._done = os.getppid(), threading.Event()

    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function in all processes.

        Raises:
            FailedElsewhereError: when another process failed first.
            InputError: when another process was lost.
        """
        self._done.clear()
        if self._rank:
            self._watch()
        try:
            return super().launch(function, *args, **kwargs)
        except Exception as error:
            if self._size > 1:
                self._fail(error)
            raise
        finally:
            self._done.set()

    def kill(self, signum: signal.Signals) -> None:  # type: ignore[override]
        """Send a signal to the processes that were started."""
        for child in self.children:
            child.send_signal(signum)

    def _call_children_scripts(self) -> None:
        super()._call_children_scripts()
        self.children, self.procs = self.procs, []  # of none, Lightning's own observer ends at once
        self._watch()

    @property
    def _rank(self) -> int:
        return self.cluster_environment.global_rank()

    @property
    def _size(self) -> int:
        return self.cluster_environment.world_size()

    def _fail(self, error: Exception) -> None:
        """Decide who says why, and raise what is to be raised instead of the error."""
        lost = self._lost() if any(sign in str(error) for sign in _LOST) and not isinstance(error, InputError) else None
        silent = lost == "" or not _first_to_fail(self._rank)
        if silent:
            _wait(lambda: all(child.poll() is not None for child in self.children))  # until the one that speaks has spoken
        self.kill(signal.SIGKILL)
        if silent:
            raise FailedElsewhereError from error
        if lost:
            raise InputError(lost) from error

    def _lost(self) -> str | None:
        """What to say where the connection to another process broke; nothing where another one says it."""
        if self.children or self._started:
            _wait(lambda: self._gone() is not None)
            return "" if self._started and self._gone() is None else self._gone()
        return self._how_lost(f"process {1 - self._rank}" if self._size == 2 else "another process")

    @property
    def _started(self) -> bool:
        """Whether the first process of this machine has started this one."""
        return isinstance(self.cluster_environment, LightningEnvironment) and self.cluster_environment.local_rank() > 0

    def _gone(self) -> str | None:
        """What to say of a process that has gone: nothing where it ended by itself, which it has said why, ``None`` of none."""
        for rank, child in enumerate(self.children, start=1):
            if code := child.poll():
                return self._how_lost(f"process {rank}", signal.Signals(-code).name) if code < 0 else ""
        return self._how_lost("process 0") if self._rank and os.getppid() != self._parent else None

    def _how_lost(self, who: str, name: str = "") -> str:
        how = f"was ended by {name}" if name else "ended without a message"
        return (
            f"{who} of {self._size} {how}, as processes do where memory runs out; run fewer of them (`devices`), take smaller "
            "batches (`batch_size`), or see the system's log"
        )

    def _watch(self) -> None:
        threading.Thread(target=self._end_with_others, daemon=True).start()

    def _end_with_others(self) -> None:
        """End this process when another one has gone and it does not notice, as it need not while it computes."""
        while not self._done.wait(_POLL):
            message = self._gone()
            if message is None or self._done.wait(_GRACE):
                continue
            if message:
                print(f"mergekit-vision: error: {message}", file=sys.stderr, flush=True)
            self.kill(signal.SIGKILL)
            os._exit(1)  # the main thread may wait in a library, where nothing interrupts it


def _first_to_fail(rank: int) -> bool:
    """Whether no other process of the run has failed yet; the store that they share counts them."""
    if not torch.distributed.is_initialized():
        return True
    try:
        return bool(_get_default_store().add(_FAILURES, 1) == 1)
    except RuntimeError:  # the first process is gone, and the store with it: the next one speaks
        return rank == 1


def _wait(until: Callable[[], bool]) -> None:
    """Wait for a condition, but not long."""
    end = time.monotonic() + _GRACE
    while not until() and time.monotonic() < end:
        time.sleep(_POLL / 4)
