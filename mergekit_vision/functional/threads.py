"""Many small decompositions at once: one of a side of 768 makes poor use of several threads, several at once do not."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from threading import local
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST = 8
"""Workers at most: each holds matrices of its own."""

_this = local()


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """``function`` of every item, in order, the processor's threads divided among several workers.

    Within one of the workers it is a plain loop. Gradients are not recorded. Where CUDA is in use all workers give their work to
    the caller's stream, so that each may use what another one made before;
    :func:`~mergekit_vision.functional.eigen.eigh` leaves it for the time of a decomposition.

    >>> in_threads(lambda n: n * n, [1, 2, 3])
    [1, 4, 9]
    """
    items, threads = list(items), torch.get_num_threads()
    # torch has one number of threads for all: workers that changed it would change how sums are rounded in the others
    workers = 1 if hasattr(_this, "is_worker") else min(threads, MOST, len(items))
    stream = _stream()

    def begin() -> None:
        _this.is_worker = True
        if stream is not None:
            torch.cuda.set_device(stream.device)  # else the thread takes memory of the first device, whichever this one is

    @torch.no_grad()  # a thread's own setting, as is the stream
    def run(item: Item) -> Result:
        # without a stream, torch's context would put CUDA to use for all that comes after
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            return function(item)

    if workers < 2:
        return [run(item) for item in items]
    torch.set_num_threads(threads // workers)
    try:
        with ThreadPoolExecutor(workers, initializer=begin) as pool:
            return list(pool.map(run, items))
    finally:
        torch.set_num_threads(threads)


def _stream() -> torch.cuda.Stream | None:
    """The caller's stream of CUDA; ``None`` where that is not in use."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    _load(torch.cuda.current_device())
    return torch.cuda.current_stream()


@cache
def _load(device: int) -> None:
    """Have torch load its linear algebra, which two threads must not make it do at once."""
    torch.linalg.cholesky_ex(torch.ones(1, 1, device=torch.device("cuda", device)))
