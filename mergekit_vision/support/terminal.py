"""Text on a terminal that may come from anyone, and a standard output that may fail."""

import os
import re
from contextlib import suppress
from typing import Any, TextIO

_ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but for tab and new line, what turns the direction of writing around, and bytes that were no UTF-8."""


def harmless(text: str) -> str:
    r"""Text in which nothing makes a terminal act: each such character becomes ``�``.

    >>> from mergekit_vision.support.terminal import harmless
    >>> harmless("a\x1b[2Jb\nc")
    'a�[2Jb\nc'
    """
    return _ACTING.sub("\ufffd", text)


class Output:
    """A standard output whose failure ends no work: what cannot be written is lost, and the first reason kept.

    Characters that it cannot show are written as escapes.

    Args:
        stream: the real one.

    Attributes:
        failure: why something was lost, if it was.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Write text, or lose it."""
        try:
            if self.failure is None:
                self._write(text)
        except OSError as error:
            self._fail(error)
        return len(text)

    def flush(self) -> None:
        """Write what is still in memory, or lose it."""
        try:
            if self.failure is None:
                self._stream.flush()
        except OSError as error:
            self._fail(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def _fail(self, error: OSError) -> None:
        self.failure = error
        with suppress(OSError, ValueError):  # what is in memory still, the interpreter writes at its end
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, self._stream.fileno())
            os.close(sink)
