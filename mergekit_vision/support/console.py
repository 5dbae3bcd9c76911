"""Messages and progress, through the logger ``mergekit_vision``: silent until logging is configured, as in any library.

The command line shows them on the terminal (:func:`console_output`); from Python,
``logging.basicConfig(level=logging.INFO)`` does.
Under several processes only the first one speaks.
"""

import logging
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TypeVar

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console, ConsoleOptions, RenderableType
from rich.errors import LiveError
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table

from mergekit_vision.support.terminal import harmless

Item = TypeVar("Item")


class _Harmless(Console):
    """A console on which no text that is shown makes the terminal act."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What is shown, piece by piece."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=harmless(segment.text))


console = _Harmless(soft_wrap=True)

logger = logging.getLogger("mergekit_vision")
logger.addHandler(logging.NullHandler())  # a library says nothing unless asked to
logger.addFilter(lambda _: _first_process())

_IRRELEVANT = (  # what Lightning says of training and of its other products, to runs that do not train
    ".*does not have many workers.*",
    ".*GPU available but not used.*",
    ".*across ranks is zero.*",
    ".*LeafSpec.*",
)


def _first_process() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


class _ConsoleHandler(logging.Handler):
    """Prints each message as one line, and tables as tables."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        shown = getattr(record, "table", None)
        # the cells of a table are markup, in which whoever made it has escaped what comes from elsewhere
        console.print(record.getMessage() if shown is None else shown, highlight=False, markup=shown is not None)


@contextmanager
def console_output() -> Iterator[None]:
    """Show messages, tables and progress on the terminal while the context is open."""
    handler, level = _ConsoleHandler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with _at_level(logging.ERROR, "huggingface_hub"):  # which announces each of its retries; our message says it once
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def as_markup(text: str) -> str:
    """Text that comes from elsewhere, for the cell of a table: shown as it is, whatever it holds."""
    return escape(harmless(text))


def show(table: Table) -> None:
    """Log a table: drawn on the command line's terminal, plain text for other handlers."""
    if logger.isEnabledFor(logging.INFO):
        with console.capture() as text:
            console.print(table)
        logger.info("%s", text.get(), extra={"table": table})


def shows_bars() -> bool:
    """Whether this is the command line on a terminal, on which progress is a bar."""
    return _first_process() and console.is_terminal and any(isinstance(handler, _ConsoleHandler) for handler in logger.handlers)


def track(items: Iterable[Item], description: str) -> Iterator[Item]:
    """Go through ``items``, showing how far it is: a bar on the command line's terminal, else one line at the end.

    >>> from mergekit_vision.support.console import console_output, track
    >>> with console_output():
    ...     keys = [key for key in track(["a", "b"], "merging")]  # doctest: +ELLIPSIS
    merging: 2 in ... s
    """
    todo = items if isinstance(items, Sequence) else list(items)
    if not (_first_process() and logger.isEnabledFor(logging.INFO)):
        yield from todo
        return
    start = time.perf_counter()
    with bar(MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True)) as progress:
        yield from todo if progress is None else progress.track(todo, description=description)
    if progress is None:
        logger.info("%s: %d in %.1f s", description, len(todo), time.perf_counter() - start)


@contextmanager
def bar(*columns: ProgressColumn) -> Iterator[Progress | None]:
    """A bar with some columns, on the command line's terminal while the context is open; ``None`` elsewhere.

    There is none within another one either where rich, before 14.1, shows one at a time.
    """
    progress = None
    with ExitStack() as stack:
        if shows_bars():
            with suppress(LiveError):
                shown = Progress(TextColumn("{task.description}"), BarColumn(), *columns, console=console)
                progress = stack.enter_context(shown)
        yield progress


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's remarks on training, devices and its other products out, while the context is open."""
    with _at_level(logging.WARNING, "lightning.pytorch", "lightning.fabric"), warnings.catch_warnings():
        for message in _IRRELEVANT:
            warnings.filterwarnings("ignore", message=message)
        yield


@contextmanager
def _at_level(level: int, *names: str) -> Iterator[None]:
    """Let some loggers say nothing below a level, while the context is open."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(level)
    try:
        yield
    finally:
        for each, before in zip(loggers, levels, strict=True):
            each.setLevel(before)
