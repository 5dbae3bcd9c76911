"""The processes of a run, which end together and with one message."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from mergekit_vision.errors import FailedElsewhereError, InputError, ProcessLostError
from mergekit_vision.runs.notices import Notices

_GRACE = 4.0  # seconds for what ends by itself
_POLL = 0.2  # seconds
_SIGNALS = {-each.value: each.name for each in signal.Signals} | {143: "SIGTERM"}
"""Exit status -> the signal that ended a process."""
_LAUNCHES = itertools.count(1)  # of all launchers of a script, whose notices share a store
_LOST = ("closed by peer", "reset by peer", "Broken pipe", "recvBytes", "sendBytes", "gloo", "NCCL")


def end_together(strategy: Strategy) -> None:
    """Have the processes that a strategy starts, or takes part in, end together; others than those of scripts do so already."""
    launcher = strategy.launcher
    if type(launcher) is _SubprocessScriptLauncher:
        strategy._launcher = Launcher(launcher.cluster_environment, launcher.num_processes, launcher.num_nodes)


class Launcher(_SubprocessScriptLauncher):
    """Starts a process for each further device, as Lightning does, unless torchrun or SLURM has; and ends all when one fails.

    Lightning kills the first process without a word when another one is gone, and leaves the others to the time limit of the
    process group when the first one is. Here, the first process that fails says why; all others end in silence. Of a process
    that was killed another one says so.

    Attributes:
        children: the processes that were started, once for all launchers of a script.
    """

    children: ClassVar[list[subprocess.Popen[bytes]]] = []

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._parent = os.getppid()

    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function in all processes.

        Raises:
            FailedElsewhereError: when another process failed first.
            ProcessLostError: when another process was lost.
        """
        self._notices, done = Notices(self._rank, self._size, next(_LAUNCHES)), threading.Event()
        self._ending = threading.Lock()  # of the thread that ends this process
        if self._size > 1:
            threading.Thread(target=self._end_with_others, args=(done,), daemon=True).start()
        try:
            return super().launch(function, *args, **kwargs)
        except BaseException as error:
            if self._size > 1:
                self._fail(error)
            raise
        finally:
            done.set()
            self._notices.leave()

    def kill(self, signum: signal.Signals) -> None:  # type: ignore[override]
        """Send a signal to the processes that were started."""
        for child in self.children:
            child.send_signal(signum)

    def _call_children_scripts(self) -> None:
        super()._call_children_scripts()
        Launcher.children, self.procs = self.procs, []  # of none, Lightning's own observer ends at once

    @property
    def _rank(self) -> int:
        return self.cluster_environment.global_rank()

    @property
    def _size(self) -> int:
        return self.cluster_environment.world_size()

    @property
    def _external(self) -> bool:
        """Whether another program has started the processes, and ends them."""
        return not isinstance(self.cluster_environment, LightningEnvironment)

    @property
    def _first_here(self) -> int:
        """Rank of the first process of this machine, which has started the others unless another program has."""
        return self._rank - self.cluster_environment.local_rank()

    def _fail(self, error: BaseException) -> None:
        """Decide who says why, and raise what is to be raised instead of the error."""
        self._ending.acquire(timeout=_GRACE)  # kept; where the watching thread has it, that ends this process
        self._notices.join()
        asked = not isinstance(error, Exception | SystemExit)  # by a signal: the user's, or of what has started the processes
        if asked and (isinstance(error, KeyboardInterrupt) or not self._is_known()):
            self.kill(signal.SIGKILL)
            return
        if self._external:
            _ignore_sigterm()
        broken = asked or (any(sign in str(error) for sign in _LOST) and not isinstance(error, InputError))
        lost = self._lost() if broken else None
        silent = lost == "" or not self._speaks(lost)
        if silent:
            _wait(lambda: all(child.poll() is not None for child in self.children))  # until the one that speaks has spoken
        self.kill(signal.SIGKILL)
        if silent:
            raise FailedElsewhereError from error
        if lost:
            raise ProcessLostError(lost) from error

    def _speaks(self, lost: str | None) -> bool:
        """Whether this process is to say why the run ends: that of no other has failed yet."""
        first = self._notices.first_to_fail()
        return (not lost or self._rank == 1) if first is None else first  # the first process is gone, and the store with it

    def _lost(self) -> str | None:
        """What to say where the connection to another process broke; nothing where another one says it."""
        _wait(self._is_known)
        message = self._gone()
        if message is not None:
            return message
        if self._notices.failures() or (self._first_here < self._rank and not self._external):
            return ""
        if self.children:
            return None
        return self._how_lost(1 - self._rank if self._size == 2 else None)

    def _is_known(self) -> bool:
        """Whether another process has failed, or has gone."""
        return self._gone() is not None or self._notices.failures() > 0

    def _gone(self) -> str | None:
        """What to say of a process that has gone: nothing where it ended by itself, which it has said why, ``None`` of none."""
        for rank, child in enumerate(self.children, start=self._rank + 1):
            if code := child.poll():
                return self._how_lost(rank, _SIGNALS.get(code, "")) if code < 0 or code in _SIGNALS else ""
        if self._external:
            lost = self._notices.gone()
            return None if lost is None else self._how_lost(lost)
        return self._how_lost(self._first_here) if self._first_here < self._rank and os.getppid() != self._parent else None

    def _how_lost(self, rank: int | None, by: str = "") -> str:
        who = f"{'another process' if rank is None else f'process {rank}'} of {self._size}"
        how = f"was ended by {by}" if by else "ended without a message"
        if by not in ("", "SIGKILL"):
            return f"{who} {how}"
        return (
            f"{who} {how}, as processes do where memory runs out; run fewer of them (`devices`), take smaller "
            "batches (`batch_size`), or see the system's log"
        )

    def _end_with_others(self, done: threading.Event) -> None:
        """End this process when another one has failed or gone and it does not notice, as it need not while it computes."""
        while not done.wait(_POLL):
            self._notices.join()
            message, grace = self._gone(), _GRACE
            if message is None and self._notices.failures():
                message, grace = "", 2 * _GRACE  # for the last words of the one that has failed, which may be among the children
            if message is None or done.wait(grace):
                continue
            if not self._ending.acquire(blocking=False) and done.wait(_GRACE):  # the main thread has failed, and may speak
                continue
            if message and self._speaks(message):
                print(f"mergekit-vision: error: {message}", file=sys.stderr, flush=True)
            self.kill(signal.SIGKILL)
            os._exit(1)  # the main thread may wait in a library, where nothing interrupts it


def _ignore_sigterm() -> None:
    """Let what has started the processes not interrupt the last words of this one, which ends anyway."""
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _wait(until: Callable[[], bool]) -> None:
    """Wait for a condition, but not long."""
    end = time.monotonic() + _GRACE
    while not until() and time.monotonic() < end:
        time.sleep(_POLL / 4)
