"""Methods that merge only a part of each task vector, its leading directions: what of it is kept, and merged anew.

An expert joins such a model, or leaves it, without the files of the others: its part is found, or left out, and all parts are
merged again. Directions are ordered by what they hold: what a larger model takes of a part is the beginning of it.
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.functional.linalg import TopSVD
from mergekit_vision.functional.ranks import shared_ranks
from mergekit_vision.functional.threads import in_threads
from mergekit_vision.functional.tsvm import tsvm_merge_of
from mergekit_vision.merger import Factors, Former, Merged, MergeInputs, Merger, Revisable, Weights

AT_ONCE = 2
"""Parameters whose parts are held at once, and that are merged at once, on a CPU."""

_FEWEST, _WHOLE = "fewest", "whole"
_Found = TypeVar("_Found")


class Part(NamedTuple):
    """The leading directions of one expert's task vector of a matrix, largest first.

    Attributes:
        left: ``[d_out, k]``.
        weights: ``[k]``, such as singular values.
        right: ``[k, d_in]``, in the dtype of ``left``.
        norm: of the whole task vector, a float64 scalar; 0 where the method does not ask for it.
    """

    left: Tensor
    weights: Tensor
    right: Tensor
    norm: Tensor

    @classmethod
    def of_triplets(cls, top: TopSVD) -> "Part":
        """Leading singular triplets, without a norm."""
        return cls(*top, torch.zeros((), dtype=torch.float64))

    def leading(self, count: int) -> "Part":
        """The first ``count`` directions, or all where there are fewer."""
        return Part(self.left[:, :count], self.weights[:count], self.right[:count], self.norm)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the shapes are those of a part of a matrix."""
        count = len(self.weights) if self.weights.dim() == 1 else -1
        found = [tuple(tensor.shape) for tensor in (self.left, self.right, self.norm)]
        return found == [(shape[0], count), (count, shape[1]), ()]


Finder = Callable[[str, str, Factors | Tensor, int], Part]
"""Task, key, the task vector or its factors, and a number of directions -> the part."""

Known = Part | Tensor | None
"""What is known of an expert's parameter: its part; the whole task vector, where it is averaged; or that it did not change."""


class ByParts(Merger):
    """A method that merges the leading directions of task vectors, and averages the parameters that have none.

    A subclass says how many directions count, finds them and combines them.
    """

    @property
    def revisable(self) -> Revisable:
        """By the parts of all experts."""
        return "state"

    @abstractmethod
    def directions_of(self, inputs: MergeInputs, key: str, tasks: int) -> int | None:
        """How many directions of each expert count in a model of so many; ``None`` where whole task vectors are averaged."""

    @abstractmethod
    def finder(self, inputs: MergeInputs, tasks: int) -> Finder:
        """What finds parts of these experts, large enough for models of ``tasks`` experts and more."""

    @abstractmethod
    def combined(self, inputs: MergeInputs, key: str, parts: Sequence[Part]) -> Tensor:
        """The merged task vector of one matrix, float32."""

    def change_of(self, inputs: MergeInputs, task: str, key: str) -> Factors | Tensor:
        """A task vector as the finder wants it."""
        return inputs.delta(task, key)

    def finished(self, inputs: MergeInputs, update: dict[str, Tensor]) -> Merged:
        """The merged model, from its merged task vectors."""
        return Merged(update)

    def merge(self, inputs: MergeInputs) -> Merged:
        """Find the parts and merge them, parameter by parameter; one that no expert changed keeps its pre-trained value."""
        fewest = max(1, len(inputs.tasks) - (inputs.keep or 0))
        return self._merged(inputs, fewest, {}, [], keeping=inputs.keep is not None)

    def revise(self, former: Former, joining: MergeInputs, leaving: MergeInputs) -> Merged:
        """Merge again the parts of those that stay, with those of the experts that join."""
        staying = [task for task in former.tasks if task not in leaving.tasks]
        tasks, fewest = len(staying) + len(joining.tasks), _fewest(former)
        parted = {key for key in joining.base if self.directions_of(joining, key, tasks) is not None}
        known = _unpacked(former, joining.base, parted)
        counts = [[self.directions_of(joining, key, of) or 0 for key in joining.base] for of in (tasks, fewest)]
        if any(now > kept for now, kept in zip(*counts, strict=True)):
            raise InputError(
                f"what was kept of the experts is enough for models of {fewest} and more, and {tasks} would be left; merge these "
                f"again from their files, with a `keep_state` that is larger by {fewest - tasks} or more",
                of="model",
            )
        return self._merged(joining, fewest, known, staying, keeping=True)

    def _merged(
        self, inputs: MergeInputs, fewest: int, known: Mapping[tuple[str, str], Known], staying: list[str], keeping: bool
    ) -> Merged:
        """The model of the experts of which parts are ``known`` and those of ``inputs``, with what is kept of all."""
        find = self.finder(inputs, fewest)

        def combined(place: tuple[str, list[Known]]) -> tuple[Tensor, Weights] | None:
            key, own = place
            parts = {task: known.get((task, key)) for task in staying} | dict(zip(inputs.tasks, own, strict=True))
            if all(part is None for part in parts.values()):
                return None
            return self._combined(inputs, key, list(parts.values())), _named(key, parts) if keeping else {}

        def merged(keys: list[str]) -> list[tuple[Tensor, Weights] | None]:
            return in_threads(combined, zip(keys, self._found(inputs, find, keys, fewest), strict=True))

        at_once = 1 if inputs.device.type == "cuda" else AT_ONCE  # experts are read ahead of one parameter
        results = inputs.spread_alike(merged, inputs.base, "merging", at_once)
        found = {key: result for key, result in results.items() if result is not None}
        model = self.finished(inputs, {key: update for key, (update, _) in found.items()})
        kept = {name: tensor for _, tensors in found.values() for name, tensor in tensors.items()}
        kept |= {_FEWEST: torch.tensor(fewest)} if keeping else {}
        return Merged(model.update, model.scale, model.fixed, kept=kept)

    def _found(self, inputs: MergeInputs, find: Finder, keys: list[str], tasks: int) -> list[list[Known]]:
        """What is known of each parameter, of each expert of ``inputs`` in their order."""
        counts = {key: self.directions_of(inputs, key, tasks) for key in keys}

        def known(place: tuple[str, str]) -> Known:
            key, task = place
            if (count := counts[key]) is None:
                return _change(inputs, task, key, inputs.delta)
            change = _change(inputs, task, key, partial(self.change_of, inputs))
            return None if change is None else find(task, key, change, count)

        found = iter(in_threads(known, product(keys, inputs.tasks)))
        return [[next(found) for _ in inputs.tasks] for _ in keys]

    def _combined(self, inputs: MergeInputs, key: str, known: Sequence[Known]) -> Tensor:
        count = self.directions_of(inputs, key, len(known))
        if count is None:
            zero = torch.zeros(inputs.base[key].shape, device=inputs.device)
            return torch.stack([part if isinstance(part, Tensor) else zero for part in known]).mean(0)
        parts = [part for part in known if isinstance(part, Part)]
        nothing = partial(Part._replace, parts[0].leading(0), norm=torch.zeros_like(parts[0].norm))
        return self.combined(inputs, key, [part.leading(count) if isinstance(part, Part) else nothing() for part in known])


def _change(inputs: MergeInputs, task: str, key: str, of: Callable[[str, str], _Found]) -> _Found | None:
    """What ``of`` gives for the task vector of one parameter; ``None`` where that is all zero."""
    if inputs.change is None:
        return of(task, key) if inputs.changed(task, key) else None
    change = of(task, key)  # a view may decompose it: once, not also to see whether it is zero
    return None if isinstance(change, Tensor) and not change.any() else change


def merged_triplets(parts: Sequence[Part]) -> Tensor:
    """The merged task vector by TSV-M, float32, of parts that are singular triplets."""
    return tsvm_merge_of([TopSVD(part.left, part.weights, part.right) for part in parts]).float()


def shared_out(parts: Sequence[Part], energies: Sequence[Tensor], rank: int, floor: float) -> list[Part]:
    """The directions that :func:`~mergekit_vision.functional.ranks.shared_ranks` leaves each part."""
    return [part.leading(k) for part, k in zip(parts, shared_ranks(energies, rank, floor), strict=True)]


def _named(key: str, parts: Mapping[str, Known]) -> Weights:
    """What is known of one parameter, by names."""
    found: dict[str, Tensor] = {}
    for task, part in parts.items():
        if isinstance(part, Part):
            # copies: what is kept of a decomposition is a corner of it
            found |= {f"{task}/{key}/{name}": tensor.clone() for name, tensor in part._asdict().items()}
        elif part is not None:
            found[f"{task}/{key}/{_WHOLE}"] = part
    return found


def _unpacked(former: Former, base: Weights, parted: Collection[str]) -> dict[tuple[str, str], Known]:
    """Task and key -> what is known, of the ``parted`` keys their part; what does not fit the model is refused."""
    tensors: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, tensor in former.kept.items():
        if name != _FEWEST:
            task, key, what = (["", "", *name.rsplit("/", 2)])[-3:]
            tensors.setdefault((task, key), {})[what] = tensor
    known = {place: _part(parts) for place, parts in tensors.items()}
    for (task, key), part in known.items():
        if task not in former.tasks or key not in base or not _fits(part, tuple(base[key].shape), key in parted):
            raise InputError(f"what was kept does not fit the model: {task}, {key or 'an unknown parameter'}; merge again")
    return known


def _fits(part: Known, shape: Sequence[int], parted: bool) -> bool:
    if isinstance(part, Part):
        return parted and part.fits(shape)
    return part is not None and not parted and part.shape == shape


def _part(tensors: Mapping[str, Tensor]) -> Known:
    if tensors.keys() == {_WHOLE}:
        return tensors[_WHOLE]
    return Part(**tensors) if tensors.keys() == set(Part._fields) else None


def _fewest(former: Former) -> int:
    if _FEWEST not in former.kept or former.kept[_FEWEST].numel() != 1:
        raise InputError("what was kept of the experts lacks for how many it is enough; merge again")
    return max(1, int(former.kept[_FEWEST]))
