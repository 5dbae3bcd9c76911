"""Work in a process that is killed, or asked to end, on the way."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

_CHANGES = {"open", "os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate"}


def files_in(directory: Path) -> dict[str, bytes]:
    """What a reader finds in a directory: name -> content; not what links that lead nowhere are called, nor folders."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Run work in a process that is killed right before its ``number``-th file operation, from 0; whether it was."""
    return _ended_by_signal(_started(lambda: (_signal_at(number, signal.SIGKILL), work())))


def signaled_at(number: int, sent: signal.Signals, work: Callable[[], int], within: str) -> int:
    """Run work in a process that gets a signal right before its ``number``-th operation on a path with some part; its status."""
    return _status(_started(lambda: (_signal_at(number, sent, within), os._exit(work()))))


def signaled_after(seconds: float, sent: signal.Signals, work: Callable[[], int]) -> int:
    """Run work in a process that gets a signal after a while, perhaps before or after the work; the status as a shell has it."""

    def whole() -> None:
        try:
            os._exit(work())
        except KeyboardInterrupt:
            os._exit(128 + signal.SIGINT)

    child = _started(whole)
    time.sleep(seconds)
    os.kill(child, sent)
    status = _status(child)
    return status if status >= 0 else 128 - status


def killed_after(seconds: float, work: Callable[[], object], by: signal.Signals = signal.SIGKILL) -> bool:
    """Run work in a process that gets a signal after a while; whether that ended it."""
    child = _started(work)
    time.sleep(seconds)
    os.kill(child, by)
    return _ended_by_signal(child)


def at_once(*works: Callable[[], object]) -> None:
    """Run each in a process of its own, all at the same time; all must succeed."""
    children = [_started(work) for work in works]
    ended = [_ended_by_signal(child) for child in children]
    assert not any(ended)


def _signal_at(number: int, sent: signal.Signals, within: str = "") -> None:
    """Have this process send itself a signal at one of its file operations."""
    count = -1

    def count_down(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event in _CHANGES and within in str(arguments):
            count += 1
            if count == number:
                os.kill(os.getpid(), sent)

    sys.addaudithook(count_down)


def _started(work: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _ended_by_signal(child: int) -> bool:
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
