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

    Gradients are not recorded. On a device other than the processor the workers only keep its queue filled.

    >>> in_threads(lambda n: n * n, [1, 2, 3])
    [1, 4, 9]
    """
    items, threads = list(items), torch.get_num_threads()
    workers = min(threads, MOST, len(items))
    if workers < 2:
        return [function(item) for item in items]

    @torch.no_grad()  # a thread's own setting
    def run(item: Item) -> Result:
        return function(item)

    torch.set_num_threads(threads // workers)
    try:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(run, items))
    finally:
        torch.set_num_threads(threads)
