"""Many small decompositions at once: one of a side of 768 makes poor use of several threads, several at once do not."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST = 8
"""Workers at most: each holds matrices of its own."""


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """``function`` of every item, in order, the processor's threads divided among several workers.

    Gradients are not recorded. Where CUDA is in use one worker does it all: its queue needs no more, and torch loads its linear
    algebra at the first call, which two threads must not make at once.

    >>> in_threads(lambda n: n * n, [1, 2, 3])
    [1, 4, 9]
    """
    items, threads = list(items), torch.get_num_threads()
    on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    workers = 1 if on_gpu else min(threads, MOST, len(items))

    @torch.no_grad()  # a thread's own setting
    def run(item: Item) -> Result:
        return function(item)

    if workers < 2:
        return [run(item) for item in items]
    torch.set_num_threads(threads // workers)
    try:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(run, items))
    finally:
        torch.set_num_threads(threads)
