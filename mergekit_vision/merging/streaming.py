"""Weights on their way to a GPU: one parameter of all experts is read while the one before is merged.

A background thread reads from the files into pinned memory, from which the device copies on a stream of its own while it computes
on another one. What was read stays on the device for the passes that follow, as long as half of its memory is free; beyond that,
two parameters of all experts are held at a time, and what a device that is behind still computes with.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
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

    def room(self) -> int:
        """Bytes of copies that may stay on the device; negative where it is more than half full."""


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

    def room(self) -> int:
        """See :class:`Copies`."""
        free, total = torch.cuda.mem_get_info(self._device)
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return free + unused - total // 2


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


Reading = Callable[[str, str], _Arrival]
"""Reads a part of an item."""


class _Window:
    """What is read of the item that is worked on and of the one after it: of a parameter the tasks, of a task the parameters.

    What nobody asks for is not read: the first question for a part of an item begins the reading of that part of the next item.

    Args:
        items: in the order in which they are worked on.
        read: called in a thread of its own.
        known: what is on the device already.
        begin: called in that thread first.
    """

    def __init__(
        self,
        items: Sequence[str],
        read: Reading,
        known: Callable[[str, str], _Arrival | None],
        begin: Callable[[], None],
    ) -> None:
        self._next: dict[str, str | None] = dict(zip(items, [*items[1:], None], strict=True)) if items else {}
        self._read, self._known = read, known
        self._current: str | None = None
        self._held: dict[str, dict[str, Future[_Arrival]]] = {}
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(1, "experts", begin)

    def enter(self, item: str | None) -> None:
        """Let go of all items but this one, which is worked on now."""
        self._current = item
        for other in [other for other in self._held if other != item]:
            for reading in self._held.pop(other).values():
                reading.cancel()

    def get(self, item: str, part: str) -> _Arrival | None:
        """A part of an item when it is read; ``None`` of one that is not worked on now.

        Raises:
            Exception: what went wrong in reading it.
        """
        if item not in self._next or item != self._current:
            return None
        with self._lock:
            found = self._known(item, part) or self._reading(item, part)
            after = self._next[item]
            if after is not None and self._known(after, part) is None:
                self._reading(after, part)
        return found if isinstance(found, _Arrival) else found.result()

    def _reading(self, item: str, part: str) -> Future[_Arrival]:
        held = self._held.setdefault(item, {})
        if part not in held:
            held[part] = self._pool.submit(self._read, item, part)
        return held[part]

    def close(self, wait: bool) -> None:
        """Read no more; ``wait`` for the tensor that is being read, or leave that to Python's exit."""
        self.enter(None)
        self._pool.shutdown(wait=wait, cancel_futures=True)


PORTION = 1 << 30
"""Bytes of a device's memory after which it is asked again whether there is room."""


class Reader:
    """Reads experts one item of work ahead, and keeps on the device what there is room for.

    Args:
        experts: task -> weights; may open each when it is asked for, which happens only when something of it is.
        base: the backbone's weights, which an expert has where it says nothing else; on the device.
        copies: puts them on the device.
    """

    def __init__(self, experts: Mapping[str, Weights], base: Weights, copies: Copies) -> None:
        self.experts, self.base = experts, base
        self._tasks = frozenset(experts)
        self._copies = copies
        self._window: _Window | None = None
        self._by_task = False
        self._kept = dict[tuple[str, str], _Arrival]()
        self._room, self._full, self._lock = 0, False, Lock()

    @contextmanager
    def ahead(self, items: Sequence[str]) -> Iterator[Callable[[str], None]]:
        """Read ahead while the context is open, and call what it gives with an item before work on it begins.

        Args:
            items: parameters' keys or tasks, in the order of the work.
        """
        self._by_task = all(item in self._tasks for item in items)

        def read(item: str, part: str) -> _Arrival:
            return self._read(*self._place(item, part))

        def known(item: str, part: str) -> _Arrival | None:
            return self._kept.get(self._place(item, part))

        window = self._window = _Window(items, read, known, self._copies.begin)
        done = False
        try:
            yield window.enter
            done = True
        finally:
            self._window = None
            window.close(wait=done)  # a failure, or an interruption, is not kept waiting for the disk

    def _place(self, one: str, other: str) -> tuple[str, str]:
        """Task and key of an item of work and a part of it, and the other way round."""
        return (one, other) if self._by_task else (other, one)

    def get(self, task: str, key: str) -> _Arrival | None:
        """A task's parameter, ready to be used, where it is read ahead or there is room for it; else ``None``."""
        window = self._window
        found = None if window is None else window.get(*self._place(task, key))
        if found is None:
            found = self._kept.get((task, key)) or (None if self._full else self._read(task, key))
        if found is None or not found.tensors:
            return None
        self._copies.wait(found.tensors, found.end)
        return found

    def value(self, task: str, key: str) -> Tensor:
        """A task's parameter, on the device where it is read ahead or there is room for it."""
        found = self.get(task, key)
        return self.experts[task][key] if found is None or len(found.tensors) != 1 else found.tensors[0]

    @torch.no_grad()  # a thread's own setting
    def _read(self, task: str, key: str) -> _Arrival:
        values = factors_of(self.experts[task], key) or (self.experts[task][key],)
        pinned = [self._copies.pin(value) for value in values]
        finite = all(value.device.type == "cpu" and _is_finite(value) for value in pinned)
        try:
            found = _Arrival(*self._copies.start(pinned), finite)
        except torch.cuda.OutOfMemoryError:  # merging alone may still fit
            self._full = True
            return _Arrival((), None, finite)
        if values[0] is not self.base.get(key):  # the backbone's own values are there already
            self._keep(task, key, found)
        return found

    def _keep(self, task: str, key: str, found: _Arrival) -> None:
        """Keep what was read if there is room for it; the first parameter for which there is none ends it."""
        size = sum(tensor.nbytes for tensor in found.tensors)
        with self._lock:
            if self._room < size and not self._full:
                room = self._copies.room()
                self._room, self._full = max(size, min(room, PORTION)), room < size
            if not self._full:
                self._room -= size
                self._kept[task, key] = found


class Streamed(MadeOn):
    """An expert's weights: on the device where they were read ahead or stay, and otherwise as the expert gives them.

    Args:
        task: whose expert it is.
        reader: of all experts.
    """

    def __init__(self, task: str, reader: Reader) -> None:
        super().__init__(reader.base, partial(reader.value, task))  # of the same keys
        self._task, self._reader = task, reader

    def factors(self, key: str) -> Factors | None:
        """Of an adapter, the factors of a weight's change, not to be written to; ``None`` where it is not known as a product."""
        found = self._reader.get(self._task, key)
        if found is None:
            return factors_of(self._reader.experts[self._task], key)
        return None if len(found.tensors) != 2 else (found.tensors[0], found.tensors[1])

    @property
    def difference(self) -> Callable[[str], Tensor | None] | None:
        """Of an expert that is stored as differences, what gives that of a key, which is not read ahead."""
        return getattr(self._reader.experts[self._task], "difference", None)

    def finite(self, key: str) -> bool:
        """Whether what is read of a key, its value or its factors, is known to be finite, also as float32."""
        found = self._reader.get(self._task, key)
        return found is not None and found.finite


def read_ahead(
    experts: Mapping[str, Weights], base: Weights, team: Team, share: Spread, copies: Copies
) -> tuple[dict[str, Weights], Spread]:
    """Experts, and a way to share out work on them, that read what work needs while what comes before is worked on.

    Args:
        experts: task -> weights, with the keys of the backbone; may open each when it is asked for.
        base: the backbone's weights, on the device.
        team: the processes; each reads what it works on itself.
        share: shares the work out among them.
        copies: puts the weights on the device.
    """
    reader = Reader(experts, base, copies)

    def sharing(function: Callable[[str], Any], items: Mapping[str, int], description: str) -> dict[str, Any]:
        with reader.ahead(team.own(items)) as enter:

            def entered(item: str) -> Any:
                enter(item)
                return function(item)

            return share(entered, items, description)

    return {task: Streamed(task, reader) for task in experts}, sharing


def _is_finite(value: Tensor) -> bool:
    if value.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return False  # not looked at
    return not value.numel() or largest_magnitude(value) <= FINITE
