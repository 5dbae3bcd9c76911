"""A request of the system to end."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

_Handler = Callable[[int, FrameType | None], Any] | int


class Terminated(BaseException):
    """SIGTERM was received."""


@contextmanager
def terminable(received: set[int]) -> Iterator[None]:
    """Raise :class:`Terminated` in the main thread on SIGTERM, while the context is open and nobody else handles it.

    Lightning calls a handler that is there before its own only takes note of the signal, which evaluation does not look at.

    Args:
        received: SIGINT and SIGTERM are added to it: there is code in C that drops what a handler raises, and fails otherwise.
    """

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        received.add(number)
        raise Terminated

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        received.add(number)
        raise KeyboardInterrupt

    with _handled(signal.SIGTERM, signal.SIG_DFL, terminate), _handled(signal.SIGINT, signal.default_int_handler, interrupt):
        yield


@contextmanager
def _handled(number: signal.Signals, default: _Handler, handler: _Handler) -> Iterator[None]:
    """Replace the default handler of a signal, where it is in place, while the context is open."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(number) != default:
        yield
        return
    signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, default)
