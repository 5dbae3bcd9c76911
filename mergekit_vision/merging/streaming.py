"""Experts' weights on their way to a GPU: one parameter of all experts is read while the one before is merged.

A background thread reads from the files into pinned memory, from which the device copies on a stream of its own while it computes
on another one. Two parameters of all experts are held at a time, and what a device that is behind still computes with.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mergekit_vision.checkpoints.weights import MadeOn
from mergekit_vision.merger import Factors, Spread, Weights, factors_of
from mergekit_vision.support.team import Team
from mergekit_vision.support.tensors import FINITE, largest_magnitude


class Copies(Protocol):
    """Copies from main memory to a device that go on beside its computations."""

    def begin(self) -> None:
        """Prepare the thread that reads; called in it, once."""

    def pin(self, value: Tensor) -> Tensor:
        """A tensor in memory that can be copied from; one that is on a device stays there."""

    def start(self, pinned: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """The copies on the device, which must not be used yet, and what to wait for."""

    def wait(self, there: Sequence[Tensor], end: Any) -> None:
        """Have all that the caller computes from now on wait until the copies are there."""


class CudaCopies:
    """Copies to a CUDA device, on a stream of their own.

    Args:
        device: of CUDA, with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """See :class:`Copies`."""
        torch.cuda.set_device(self._device)  # else the thread takes memory of the first device, whichever this one is

    def pin(self, value: Tensor) -> Tensor:
        """See :class:`Copies`."""
        if value.device.type != "cpu":
            return value
        return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value)

    def start(self, pinned: Sequence[Tensor]) -> tuple[list[Tensor], torch.cuda.Event]:
        """See :class:`Copies`."""
        if any(value.is_cuda for value in pinned):  # it was computed on this thread's stream
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            there = [value.to(self._device, non_blocking=True) for value in pinned]
        return there, self._stream.record_event()

    def wait(self, there: Sequence[Tensor], end: torch.cuda.Event) -> None:
        """See :class:`Copies`."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(end)
        for tensor in there:
            tensor.record_stream(current)  # its memory is not used for the next copy before this stream is done with it


def copies_to(device: torch.device) -> Copies | None:
    """What copies to a device where that can go on beside its computations; else ``None``."""
    if device.type != "cuda":
        return None
    return _cuda_copies(torch.cuda.current_device() if device.index is None else device.index)


@cache  # memory that was taken for one stream is not used for another
def _cuda_copies(index: int) -> Copies:
    return CudaCopies(torch.device("cuda", index))


class _Arrival(NamedTuple):
    """What was read of one task's parameter.

    Attributes:
        tensors: its value or, of an adapter, the two factors of its change; in the dtype of the file, on the device. Empty where
            that had no memory for them.
        end: what to wait for before they are used.
        finite: whether they are known to be finite, also as float32.
    """

    tensors: Sequence[Tensor]
    end: Any
    finite: bool


class _Window:
    """The parameter that is merged and the one after it, as far as they are read.

    An expert that nobody asks for is not read: the first question for a parameter begins the reading of its next one.

    Args:
        keys: of the parameters, in the order in which they are merged.
        read: reads one task's parameter; called in a thread of its own.
        begin: called in that thread first.
    """

    def __init__(self, keys: Sequence[str], read: Callable[[str, str], _Arrival], begin: Callable[[], None]) -> None:
        self._next: dict[str, str | None] = dict(zip(keys, [*keys[1:], None], strict=True)) if keys else {}
        self._read = read
        self._current: str | None = None
        self._held: dict[str, dict[str, Future[_Arrival]]] = {}
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(1, "experts", begin)

    def enter(self, key: str | None) -> None:
        """Let go of all parameters but this one, which is merged now."""
        self._current = key
        for other in [other for other in self._held if other != key]:
            for reading in self._held.pop(other).values():
                reading.cancel()

    def get(self, task: str, key: str) -> _Arrival | None:
        """A task's parameter when it is read; ``None`` of one that is not merged now.

        Raises:
            Exception: what went wrong in reading it.
        """
        if key not in self._next or key != self._current:
            return None
        with self._lock:
            reading, after = self._reading(task, key), self._next[key]
            if after is not None:
                self._reading(task, after)
        return reading.result()

    def _reading(self, task: str, key: str) -> Future[_Arrival]:
        held = self._held.setdefault(key, {})
        if task not in held:
            held[task] = self._pool.submit(self._read, task, key)
        return held[task]

    def close(self, wait: bool) -> None:
        """Read no more; ``wait`` for the tensor that is being read, or leave that to Python's exit."""
        self.enter(None)
        self._pool.shutdown(wait=wait, cancel_futures=True)


class Reader:
    """Reads experts one parameter ahead of the one that is merged.

    Args:
        experts: task -> weights.
        copies: puts them on the device.
    """

    def __init__(self, experts: Mapping[str, Weights], copies: Copies) -> None:
        self.experts = dict(experts)
        self._copies = copies
        self._window: _Window | None = None

    @contextmanager
    def ahead(self, keys: Sequence[str]) -> Iterator[Callable[[str], None]]:
        """Read ahead while the context is open, and call what it gives with a key before that parameter is merged.

        Args:
            keys: in the order in which they will be merged.
        """
        window = self._window = _Window(keys, self._read, self._copies.begin)
        done = False
        try:
            yield window.enter
            done = True
        finally:
            self._window = None
            window.close(wait=done)  # a failure, or an interruption, is not kept waiting for the disk

    def get(self, task: str, key: str) -> _Arrival | None:
        """A task's parameter, ready to be used, where it is the one that is merged now; else ``None``."""
        window = self._window
        found = None if window is None else window.get(task, key)
        if found is None or not found.tensors:
            return None
        self._copies.wait(found.tensors, found.end)
        return found

    @torch.no_grad()  # a thread's own setting
    def _read(self, task: str, key: str) -> _Arrival:
        values = factors_of(self.experts[task], key) or (self.experts[task][key],)
        pinned = [self._copies.pin(value) for value in values]
        finite = all(value.device.type == "cpu" and _is_finite(value) for value in pinned)
        try:
            return _Arrival(*self._copies.start(pinned), finite)
        except torch.cuda.OutOfMemoryError:  # merging alone may still fit
            return _Arrival((), None, finite)


class Streamed(MadeOn):
    """An expert's weights: on the device where they were read ahead, and otherwise as the expert gives them.

    Args:
        task: whose expert it is.
        reader: of all experts.
    """

    def __init__(self, task: str, reader: Reader) -> None:
        super().__init__(reader.experts[task], self._value)
        self._task, self._reader, self._weights = task, reader, reader.experts[task]

    def _value(self, key: str) -> Tensor:
        found = self._reader.get(self._task, key)
        return self._weights[key] if found is None or len(found.tensors) != 1 else found.tensors[0]

    def factors(self, key: str) -> Factors | None:
        """Of an adapter, the factors of a weight's change, not to be written to; ``None`` where it is not known as a product."""
        found = self._reader.get(self._task, key)
        if found is None:
            return factors_of(self._weights, key)
        return None if len(found.tensors) != 2 else (found.tensors[0], found.tensors[1])

    def finite(self, key: str) -> bool:
        """Whether what is read of a key, its value or its factors, is known to be finite, also as float32."""
        found = self._reader.get(self._task, key)
        return found is not None and found.finite


def read_ahead(experts: Mapping[str, Weights], team: Team, share: Spread, copies: Copies) -> tuple[dict[str, Weights], Spread]:
    """Experts, and a way to share out work on their parameters, that read each parameter while the one before is merged.

    Args:
        experts: task -> weights.
        team: the processes; each reads what it merges itself.
        share: shares the work out among them.
        copies: puts the weights on the device.
    """
    reader = Reader(experts, copies)

    def sharing(function: Callable[[str], Any], items: Mapping[str, int], description: str) -> dict[str, Any]:
        with reader.ahead([item for item in team.own(items) if item not in experts]) as enter:

            def entered(item: str) -> Any:
                enter(item)
                return function(item)

            return share(entered, items, description)

    return {task: Streamed(task, reader) for task in experts}, sharing


def _is_finite(value: Tensor) -> bool:
    if value.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return False  # not looked at
    return not value.numel() or largest_magnitude(value) <= FINITE
