"""How far downloads are, told by the bytes that arrive in directories, whichever library downloads."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich import filesize
from rich.progress import DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from mergekit_vision.support.console import bar, logger

_PAUSE = 0.5  # seconds between two looks


def bytes_below(place: Path | None) -> int:
    """Size of all files below a directory, which may change meanwhile; what links lead to does not count."""
    total = 0
    for directory, _, names in os.walk(place) if place is not None else ():
        for name in names:
            with suppress(OSError):  # gone again
                total += Path(directory, name).lstat().st_size
    return total


class Transfer:
    """One bar on the command line's terminal for many downloads, and a line for each when it has ended.

    Args:
        progress: the bar; ``None`` without a terminal.
        total: bytes of all that is expected.
    """

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._done = progress, 0
        self._task = None if progress is None else progress.add_task("", total=total or None)

    @contextmanager
    def of(self, name: str, place: Path | None, expected: int) -> Iterator[None]:
        """Show one download while the context is open.

        Args:
            name: what is downloaded.
            place: directory in which its bytes arrive, where it is known.
            expected: how many.
        """
        start, before, ended = time.perf_counter(), bytes_below(place), threading.Event()

        def watch() -> None:
            while not ended.wait(_PAUSE):
                self._show(name, min(bytes_below(place) - before, expected))

        watcher = threading.Thread(target=watch, daemon=True)
        self._show(name, 0)
        if self._progress is not None:
            watcher.start()
        try:
            yield
        finally:
            ended.set()
            if self._progress is not None:
                watcher.join()
            self._done += expected
        arrived = bytes_below(place) - before
        took = f"{filesize.decimal(arrived)} in {time.perf_counter() - start:.1f} s" if arrived > 0 else "was here, and is whole"
        logger.info("%s: %s", name, took)

    def _show(self, name: str, arrived: int) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=name, completed=self._done + max(0, arrived))


@contextmanager
def transfer(total: int) -> Iterator[Transfer]:
    """Show downloads of ``total`` bytes in all while the context is open."""
    with bar(DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as progress:
        yield Transfer(progress, total)
