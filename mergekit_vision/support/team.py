"""Work shared among the processes of a run."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device

from mergekit_vision.errors import InputError
from mergekit_vision.support.console import track

Result = TypeVar("Result")


def _same(value: Any, source: int) -> Any:
    return value


@dataclass(frozen=True)
class Team:
    """The processes of a run.

    Attributes:
        rank: number of this one.
        size: how many there are.
        broadcast: gives every process the value that process number ``source`` has.
    """

    rank: int = 0
    size: int = 1
    broadcast: Callable[[Any, int], Any] = _same

    def own(self, items: Mapping[str, int]) -> list[str]:
        """Those of the items, with their costs, that this process computes in :meth:`spread`, in that order."""
        owners = assign_by_cost(items, self.size)
        return [item for item in items if owners[item] == self.rank]

    def spread(
        self,
        function: Callable[[str], Result],
        items: Mapping[str, int],
        description: str,
        device: torch.device,
    ) -> dict[str, Result]:
        """``function`` of every item, each computed by one process and sent to all.

        Args:
            function: what is to be done; it must not talk to other processes itself.
            items: item -> its cost, in any unit.
            description: for the progress bar; without one where it is empty.
            device: where the tensors in the results are put.

        Raises:
            Exception: on every process, when ``function`` fails on one of them; see :meth:`raise_together`.
        """
        own = self.own(items)
        if self.size == 1:
            return {item: function(item) for item in _tracked(own, description)}
        done, failure = _attempt(function, _tracked(own, description))
        self.raise_together(failure)
        received = {}
        for item, owner in assign_by_cost(items, self.size).items():
            # tensors travel through main memory: a device's name means another one elsewhere
            sent = move_data_to_device(done.pop(item), "cpu") if owner == self.rank else None
            received[item] = move_data_to_device(self.broadcast(sent, owner), device)
        return received

    def raise_together(self, failure: Exception | None) -> None:
        """Raise on all processes if one of them has failed, instead of letting the others wait for it.

        Raises:
            InputError: when a user's mistake was the reason on another process, of the same class.
            RuntimeError: when something else was.
        """
        if self.size > 1:
            failures = [self.broadcast(_described(failure), rank) for rank in range(self.size)]
        if failure is not None:
            raise failure
        for kind, message, of in filter(None, failures if self.size > 1 else []):
            raise kind(message, of) if issubclass(kind, InputError) else kind(f"another process failed: {message}")

    def gather(self, value: Result) -> list[Result]:
        """The values of all processes, by rank, on every process."""
        return [self.broadcast(value if rank == self.rank else None, rank) for rank in range(self.size)]


ALONE = Team()


def _described(failure: Exception | None) -> tuple[type[Exception], str, str | None] | None:
    """A failure as other processes raise it, which may not know its class."""
    if isinstance(failure, InputError):
        return type(failure), str(failure), failure.of
    return None if failure is None else (RuntimeError, str(failure), None)


def assign_by_cost(items: Mapping[str, int], size: int) -> dict[str, int]:
    """Item -> process, so that every process has about the same cost; the most expensive items go first.

    >>> from mergekit_vision.support.team import assign_by_cost
    >>> assign_by_cost({"a": 1, "b": 3, "c": 2}, 2)
    {'a': 1, 'b': 0, 'c': 1}
    """
    load, owners = [0] * size, {}
    for item in sorted(items, key=lambda item: -items[item]):
        owners[item] = min(range(size), key=load.__getitem__)
        load[owners[item]] += max(1, items[item])
    return {item: owners[item] for item in items}


def _tracked(items: list[str], description: str) -> Iterable[str]:
    return track(items, description) if description else items


def _attempt(function: Callable[[str], Result], items: Iterable[str]) -> tuple[dict[str, Result], Exception | None]:
    done: dict[str, Result] = {}
    try:
        for item in items:
            done[item] = function(item)
    except Exception as error:  # whatever it is, the other processes must hear of it
        return {}, error
    return done, None
