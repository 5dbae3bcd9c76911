"""Progress of long loops: a rich bar on a terminal, plain lines elsewhere; only the first process speaks."""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")

console = Console(soft_wrap=True)


def say(message: str) -> None:
    """Print one line, from the first process only."""
    if getattr(rank_zero_only, "rank", 0) == 0:
        console.print(message, highlight=False, markup=False)


def track(items: Iterable[Item], description: str) -> Iterator[Item]:
    """Go through ``items``, showing how far it is.

    >>> [key for key in track(["a", "b"], "merging")]  # doctest: +ELLIPSIS
    merging: 2 in ... s
    ['a', 'b']
    """
    todo = items if isinstance(items, Sequence) else list(items)
    if getattr(rank_zero_only, "rank", 0) != 0:
        yield from todo
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with Progress(*columns, console=console) as progress:
            yield from progress.track(todo, description=description)
    else:
        start = time.perf_counter()
        yield from todo
        say(f"{description}: {len(todo)} in {time.perf_counter() - start:.1f} s")
