"""The contract of a merging method: :class:`MergeInputs` goes in, :class:`Merged` comes out of a :class:`Merger`.

This file is all that the author of a plugin has to read.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, get_args

import torch
from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.routers import LowRankExperts
from mergekit_vision.support.allocator import release_freed_memory
from mergekit_vision.support.tensors import largest_magnitude

Weights = Mapping[str, Tensor]
"""Key of a parameter of the vision tower (``visual.…``) -> tensor. Lazy: a tensor is read when it is asked for."""

Factors = tuple[Tensor, Tensor]
"""``up [d_out, r]`` and ``down [r, d_in]``, whose product is a task vector of low rank."""

Observer = Callable[[Tensor], None]
"""Receives one layer's input for one batch of images: ``[images, tokens, d_in]``, float32, on the merging device."""

GradientObserver = Callable[[Tensor, Tensor], None]
"""Receives one layer's input for one batch of images, and the gradient by its output: ``[images, tokens, d_in]`` and
``[images, tokens, d_out]``, float32, on the merging device."""

Change = Callable[[str, str, Tensor], Tensor]
"""Turns the task vector of a task's parameter, float32 in memory of its own, into the one that is merged instead; in several
threads at once."""

Spread = Callable[[Callable[[str], Any], Mapping[str, int], str], dict[str, Any]]
"""Computes a function of named items of known cost, with a description of the work, and returns all results."""

DataNeeds = Literal["none", "proxies", "labels"]
"""What a method needs besides the experts' weights: nothing, unlabeled proxy images, or labeled images."""

ModelKind = Literal["static", "dynamic", "oracle"]
"""What a method returns: one plain encoder, one with routed experts, or experts in few bytes that are told each image's task."""

Revisable = Literal["no", "model", "state"]
"""Whether experts can join and leave a method's merged models exactly, without the files of the other experts: they cannot; with
what the model's weights hold; or with :attr:`Merged.kept` besides."""

_Result = TypeVar("_Result")
Parts = TypeVar("Parts", bound=tuple[Tensor, ...])

AT_ONCE = 8
"""Items, roughly, whose parts of a sum are held at once on GPUs; on a CPU each process holds one."""

IN_CACHE = 1 << 16
"""Entries of a sum that are worked on at once: in float64 they still lie in the processor's cache."""
FEW = 4
"""Experts whose values are added up at once; those that no file maps are in memory meanwhile."""

_NO_PROXIES = "this merging method needs proxy images, but none are configured; give the data module proxies"


LinearKind = Literal["in_proj", "out_proj", "c_fc", "c_proj"]
"""Role of a Linear layer in its block: attention's fused query-key-value projection and its output projection, the MLP's first
and second layer."""


class LinearInfo(NamedTuple):
    """One Linear layer of the encoder that is merged.

    Attributes:
        name: of the layer, for :meth:`MergeInputs.observe` and :attr:`Merged.routed`.
        weight: key of its weight, ``[d_out, d_in]``, in :data:`Weights`.
        bias: key of its bias, ``[d_out]``; ``None`` where it has none.
        kind: its role in its block.
        block: index of its block, from 0 at the input.
    """

    name: str
    weight: str
    bias: str | None
    kind: LinearKind
    block: int


def factors_of(weights: Weights, key: str) -> Factors | None:
    """The factors of a weight's change, as an adapter gives them; ``None`` of others, and where it is not known as a product."""
    find = getattr(weights, "factors", None)
    found: Factors | None = None if find is None else find(key)
    return found


def difference_of(weights: Weights, key: str) -> Tensor | None:
    """How a parameter differs from the backbone's, new memory, where an expert is known by that; ``None`` of others."""
    find = getattr(weights, "difference", None)
    found: Tensor | None = None if find is None else find(key)
    return found


def linears_of_kind(linears: Iterable[LinearInfo], kinds: Sequence[LinearKind]) -> list[LinearInfo]:
    """Those of the ``linears`` whose kind is one of ``kinds``, in their order.

    Raises:
        InputError: when there is none, or a kind is unknown.
    """
    known = list(linears)
    if not known:
        raise InputError("the inputs have no Linear layers, which this merging method needs; give MergeInputs their `linears`")
    chosen = [linear for linear in known if linear.kind in kinds]
    if not chosen or not set(kinds) <= set(get_args(LinearKind)):
        raise InputError(_not_kinds(kinds))
    return chosen


def _not_kinds(kinds: Sequence[LinearKind]) -> str:
    return f"layers is {list(kinds)}, but must name some of {', '.join(get_args(LinearKind))}"


class NormInfo(NamedTuple):
    """One layer normalization inside a block of the encoder that is merged.

    Attributes:
        name: of the layer.
        weight: key of its gain, ``[d]``, in :data:`Weights`.
        bias: key of its offset, ``[d]``.
        block: index of its block.
    """

    name: str
    weight: str
    bias: str
    block: int


class Streams(Protocol):
    """Runs proxy images through an encoder block by block, with any weights: each block costs one pass, whoever asks.

    The tokens are the caller's own, and can be written to. On Linux and a CPU, large ones lie in temporary files, not in memory.
    """

    def embed(self, task: str, weights: Weights) -> Tensor:
        """A task's proxy images as the tokens that enter block 0, ``[images, tokens, d]``, float32."""

    def block(self, index: int, weights: Weights, tokens: Tensor, observers: Mapping[str, Observer]) -> Tensor:
        """The tokens that leave a block, ``[images, tokens, d]``; ``observers`` see the inputs of its layers by name."""


class RunProxies(Protocol):
    """Runs one task's proxy images through its expert, or through ``model``, with observers on named Linear layers."""

    def __call__(self, task: str, observers: Mapping[str, Observer], model: "Merged | None") -> None:
        """Run them; see :meth:`MergeInputs.observe`."""


class RunBackward(Protocol):
    """Runs one task's proxy images through ``model`` and back, with observers of named Linear layers."""

    def __call__(self, task: str, observers: Mapping[str, GradientObserver], model: "Merged") -> None:
        """Run them; see :meth:`MergeInputs.differentiate`."""


def _untracked(items: Iterable[str], description: str) -> Iterable[str]:
    return items


def _alone(function: Callable[[str], Any], items: Mapping[str, int], description: str) -> dict[str, Any]:
    return {item: function(item) for item in items}


@dataclass(frozen=True)
class MergeInputs:
    """What a merger may use: the backbone, the experts and, on demand, the activations on proxy images.

    Attributes:
        base: weights of the pre-trained vision tower.
        experts: task -> weights with the keys and shapes of ``base``, in the order of the suite. Those of adapters have a method
            ``factors(key)`` besides, those that are stored as differences a method ``difference(key)``, and those that are read
            ahead a method ``finite(key)``, of what is read of a key.
        linears: the encoder's Linear layers in forward order.
        norms: the layer normalizations of its blocks, in forward order.
        depths: key -> index of the block that the parameter lies in; -1 before the first block, their number behind the last.
        device: where deltas are put and merging computes.
        run_proxies: behind :meth:`observe`; ``None`` where there are no proxy images.
        choose_scale: behind :meth:`coefficient`; ``None`` takes the merger's own.
        track: wraps a loop in a progress bar: ``for key in inputs.track(keys, "merging"):``.
        share: behind :meth:`spread`.
        streams: runs the proxy images block by block; ``None`` where there are none. :attr:`blocks` asks for it.
        change: what :meth:`view` does to task vectors.
        run_backward: behind :meth:`differentiate`; ``None`` where there are no proxy images.
        keep: how many experts are to be able to leave the model later, where :attr:`Merged.kept` is wanted; else ``None``.
        processes: how many share the work, behind :meth:`spread_sum`.
    """

    base: Weights
    experts: Mapping[str, Weights]
    linears: tuple[LinearInfo, ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    run_proxies: RunProxies | None = None
    choose_scale: "Callable[[Merged], float] | None" = None
    track: Callable[[Iterable[str], str], Iterable[str]] = _untracked
    share: Spread = _alone
    norms: tuple[NormInfo, ...] = ()
    depths: Mapping[str, int] = field(default_factory=dict)
    streams: Streams | None = None
    change: Change | None = None
    keep: int | None = None
    run_backward: RunBackward | None = None
    processes: int = 1

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of the suite."""
        return tuple(self.experts)

    def delta(self, task: str, key: str) -> Tensor:
        """Task vector of one parameter: fine-tuned minus pre-trained; float32, new memory, on ``device``.

        Of an adapter it is the product of the factors, and of an expert that is stored as differences these. The difference of
        weights has their rounding errors, which make the rank full; methods that give all singular vectors a say then merge
        noise.

        Raises:
            InputError: when the expert holds NaN or infinity there.
        """
        if (factors := self._factors(task, key)) is not None:
            delta = factors[0] @ factors[1]
        elif (difference := difference_of(self.experts[task], key)) is not None:
            delta = self._finite(difference, task, key)
        else:
            delta = self._expert(task, key) - self.base[key].to(self.device, torch.float32)
        return delta if self.change is None else self.change(task, key, delta)

    def deltas(self, key: str) -> Tensor:
        """Task vectors of one parameter for all tasks, ``[T, *shape]`` in the order of :attr:`tasks`; float32, new memory."""
        stack = torch.empty(len(self.tasks), *self.base[key].shape, device=self.device)
        for row, task in zip(stack, self.tasks, strict=True):
            row.copy_(self.delta(task, key))
        return stack

    def total(self, key: str) -> Tensor:
        """Sum of the task vectors of one parameter: float64, new memory, on ``device``.

        Raises:
            InputError: when an expert holds NaN or infinity there.
        """
        total = torch.zeros(self.base[key].shape, dtype=torch.float64, device=self.device)
        whole = list[str]()
        for task in self.tasks:
            if (factors := self.factors(task, key)) is not None:
                total += factors[0] @ factors[1]
            elif not self.is_whole(task, key):
                total += self.delta(task, key)
            else:
                whole.append(task)
        # of whole weights no task vector is written out: the backbone is subtracted in the end
        for at in range(0, len(whole), FEW):
            _add_up(total, [self.experts[task][key].to(self.device, torch.float32) for task in whole[at : at + FEW]])
        if whole:
            _add_up(total, [self.base[key].to(self.device, torch.float32)], -len(whole))
        if total.numel() and not math.isfinite(largest_magnitude(total)):
            for task in whole:
                self._expert(task, key)  # names the one that is to blame
        return total

    def factors(self, task: str, key: str) -> Factors | None:
        """A task vector as a product, float32 on ``device``, to be read only; ``None`` where it is not known as one of low rank.

        Raises:
            InputError: when the expert holds NaN or infinity there.
        """
        return None if self.change is not None else self._factors(task, key)

    def changed(self, task: str, key: str) -> bool:
        """Whether a task vector is not all zero; cheaper than the task vector itself."""
        if not self.is_whole(task, key):
            return bool(self.delta(task, key).any())
        expert, base = (weights[key].to(self.device, torch.float32) for weights in (self.experts[task], self.base))
        return not torch.equal(expert, base)

    def is_whole(self, task: str, key: str) -> bool:
        """Whether a task vector is known as the difference of an expert's weight and the backbone's, and in no other way."""
        stored = getattr(self.experts[task], "difference", None) is not None  # asked without reading any
        return self.change is None and not stored and factors_of(self.experts[task], key) is None

    def any_changed(self, key: str) -> bool:
        """Whether some expert changed a parameter."""
        return any(self.changed(task, key) for task in self.tasks)

    def pair(self, task: str, key: str) -> tuple[Tensor, Tensor]:
        """Two tensors whose difference is a task vector: mapped from files where they can be, of any dtype and device."""
        if self.is_whole(task, key):
            return self.experts[task][key], self.base[key]
        delta = self.delta(task, key)
        return delta, torch.zeros_like(delta)

    def view(self, change: Change) -> "MergeInputs":
        """The same inputs with other task vectors: ``change`` of a task, a key and the task vector there.

        What the experts do on proxy images stays as it was. Views can be taken of views.
        """
        before = self.change
        both = change if before is None else lambda task, key, delta: change(task, key, before(task, key, delta))
        return replace(self, change=both)

    @property
    def blocks(self) -> Streams:
        """Runs proxy images block by block.

        Raises:
            InputError: when there are no proxy images.
        """
        if self.streams is None:
            raise InputError(_NO_PROXIES)
        return self.streams

    def _expert(self, task: str, key: str) -> Tensor:
        return self._finite(self.experts[task][key], task, key)

    def _factors(self, task: str, key: str) -> Factors | None:
        found = factors_of(self.experts[task], key)
        return None if found is None else (self._finite(found[0], task, key), self._finite(found[1], task, key))

    def _finite(self, value: Tensor, task: str, key: str) -> Tensor:
        value = value.to(self.device, torch.float32)
        known = getattr(self.experts[task], "finite", None)  # to look here, the host would have to wait for the device
        if known is not None and known(key):
            return value
        if value.numel() and not math.isfinite(largest_magnitude(value)):
            raise InputError(f"the expert of task {task} holds NaN or infinity in {key}; fine-tune it again or leave it out")
        return value

    def observe(self, task: str, observers: Mapping[str, Observer], model: "Merged | None" = None) -> None:
        """Run a task's proxy images once and hand each named Linear's input to its observer, batch by batch.

        Args:
            task: whose proxy images run, through that task's expert.
            observers: name of one of :attr:`linears` -> observer.
            model: run this merged model on the images instead of the expert.

        Raises:
            InputError: when there are no proxy images, or a name is not that of one of :attr:`linears`.
        """
        if self.run_proxies is None:
            raise InputError(_NO_PROXIES)
        self._check_names(observers)
        self.run_proxies(task, observers, model)

    def differentiate(self, task: str, observers: Mapping[str, GradientObserver], model: "Merged") -> None:
        """Run a task's proxy images through a static merged model and back: how its distance from the expert depends on layers.

        What is differentiated is the Kullback-Leibler divergence of the model's class probabilities from those of the task's
        expert, in nats, summed over the images; no label is looked at, but the class names are.

        Args:
            task: whose proxy images run, and whose classes are told apart.
            observers: name of one of :attr:`linears` -> function of the layer's input ``[images, tokens, d_in]`` and the gradient
                by its output ``[images, tokens, d_out]``, both float32 on ``device``, batch by batch.
            model: what runs.

        Raises:
            InputError: when there are no proxy images, a name is not that of one of :attr:`linears`, or the model has experts.
        """
        if self.run_backward is None:
            raise InputError(_NO_PROXIES)
        self._check_names(observers)
        self.run_backward(task, observers, model)

    def _check_names(self, observers: Iterable[str]) -> None:
        names = [linear.name for linear in self.linears]
        unknown = [name for name in observers if name not in names]
        if unknown:
            raise InputError(f"not a Linear layer of this encoder: {', '.join(unknown)}; its layers are {', '.join(names)}")

    def spread(self, function: Callable[[str], _Result], items: Iterable[str], description: str) -> dict[str, _Result]:
        """``function`` of every item, as :attr:`track` shows it; with several processes each computes a share.

        The result does not depend on the number of processes, and every process gets all of it. ``function`` may call
        :meth:`observe` and :meth:`differentiate`, and nothing that needs the other processes: not :meth:`coefficient`, not
        :meth:`spread` again.

        Args:
            function: of a task's name or a parameter's key, giving tensors, numbers, or collections of them.
            items: tasks, or keys of :attr:`base`; these are shared out by size, matrices by size times rows.
            description: what the progress bar says.
        """

        def compute(item: str) -> _Result:
            try:
                return function(item)
            finally:
                release_freed_memory()

        return self.share(compute, {item: self._cost(item) for item in items}, description)

    def spread_alike(
        self, function: Callable[[list[str]], list[_Result]], keys: Iterable[str], description: str, at_once: int
    ) -> dict[str, _Result]:
        """:meth:`spread` over groups of parameters of like shapes, the dearest first, for a function that merges several at once.

        Threads get more done on several matrices than when they share the many small steps of one; but each takes memory.

        Args:
            function: of some parameters' keys, giving as many results; else as for :meth:`spread`.
            keys: keys of :attr:`base`.
            description: what the progress bar says.
            at_once: how many make a group, at least 1; the same in all processes, which share out the groups.

        Returns:
            The result of each key, in the order of the keys.
        """
        todo = list(keys)
        alike = sorted(todo, key=lambda key: (-self._cost(key), self.base[key].shape))
        groups = {alike[at]: alike[at : at + at_once] for at in range(0, len(alike), at_once)}
        found = self.spread(lambda first: function(groups[first]), groups, description)
        results = {key: result for first, group in groups.items() for key, result in zip(group, found[first], strict=True)}
        return {key: results[key] for key in todo}

    def spread_sum(
        self, function: Callable[[str], Mapping[str, Parts]], items: Iterable[str], description: str
    ) -> dict[str, Parts]:
        """Sums over the items of what ``function`` gives, tensors by name; as :meth:`spread`, but without holding them all.

        They are added up in the order of the items, and of each name, the first item's tensors become the sums.
        """
        # a GPU is kept waiting if the experts are not read ahead, which they are within a group
        todo, size = list(items), self.processes * (max(1, AT_ONCE // self.processes) if self.device.type == "cuda" else 1)
        groups, totals = {todo[at]: todo[at : at + size] for at in range(0, len(todo), size)}, dict[str, Parts]()
        for first in self.track(list(groups), description):
            found = self.spread(function, groups[first], "")
            for item in groups[first]:
                add_up(totals, found.pop(item))
        return totals

    def _cost(self, item: str) -> int:
        """What merging an item costs, roughly: matrices are decomposed, which also tells ``[4d, d]`` from ``[d, 4d]``."""
        if item not in self.base:
            return 1
        value = self.base[item]
        return value.numel() * (len(value) if value.dim() == 2 else 1)

    def spread_changed(self, function: Callable[[str], _Result], keys: Iterable[str], description: str) -> dict[str, _Result]:
        """:meth:`spread` over the parameters among ``keys`` that some expert changed; the others are left out of the result."""

        def changed(key: str) -> _Result | None:
            return function(key) if self.any_changed(key) else None

        return {key: value for key, value in self.spread(changed, keys, description).items() if value is not None}

    def matrices(self, everywhere: bool = True) -> frozenset[str]:
        """Keys of the matrices: the weights of :attr:`linears` and, ``everywhere``, those outside of the blocks."""
        return self._matrices if everywhere else frozenset(linear.weight for linear in self.linears)

    @cached_property
    def _matrices(self) -> frozenset[str]:
        return frozenset(key for key, value in self.base.items() if value.dim() == 2)

    def coefficient(self, merged: "Merged") -> float:
        """The scaling coefficient at which ``merged`` is to be used: the user's number, the searched one, or its own."""
        return merged.scale if self.choose_scale is None else self.choose_scale(merged)


@dataclass(frozen=True)
class CompressedExpert:
    """A task's own expert in few bytes, for images whose task is known.

    Attributes:
        bytes: what has to be stored for it, besides what all tasks share.
        update: computes its task vector, key -> float32 tensor; absent keys keep their pre-trained values.
    """

    bytes: int
    update: Callable[[], Weights]


@dataclass(frozen=True)
class Merged:
    """A merged model as data: ``W = W_0 + scale * update``.

    Attributes:
        update: the merged task vector, key -> float32 tensor. A key that is absent keeps its pre-trained value.
        scale: scaling coefficient, unless the user sets or searches another.
        fixed: keys of ``update`` that are added with coefficient 1 whatever the scale.
        routed: Linear name -> low-rank experts added to that layer's output, chosen per image or token.
        experts: of an oracle, task -> its compressed expert. They are what is evaluated; ``update`` is what they share.
        shared_bytes: of an oracle, what all tasks share, besides one encoder.
        kept: name -> tensor of what :meth:`Merger.revise` needs besides the model, where :attr:`MergeInputs.keep` asks for it.
    """

    update: Weights
    scale: float = 1.0
    fixed: frozenset[str] = frozenset()
    routed: Mapping[str, LowRankExperts] = field(default_factory=dict)
    experts: Mapping[str, CompressedExpert] = field(default_factory=dict)
    shared_bytes: int = 0
    kept: Weights = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = self.fixed - self.update.keys()
        if unknown:
            raise ValueError(f"fixed names keys that update does not have: {sorted(unknown)}")

    @property
    def scalable(self) -> bool:
        """Whether the scaling coefficient changes anything."""
        return any(key not in self.fixed for key in self.update)

    def coefficient(self, key: str, scale: float | None = None) -> float:
        """Coefficient of one key when the model is used at ``scale`` (its own where ``None``)."""
        return 1.0 if key in self.fixed else self.scale if scale is None else scale


@dataclass(frozen=True)
class Former:
    """A model merged before, which an expert joins or leaves.

    Attributes:
        tasks: of its experts, in the order in which they were merged.
        change: key -> ``W - W_0``, float32: the update times its coefficient, rounded as the model's weights are.
        scale: the coefficient.
        kept: what :attr:`Merged.kept` was.
    """

    tasks: tuple[str, ...]
    change: Weights
    scale: float
    kept: Weights = field(default_factory=dict)

    def update(self, key: str) -> Tensor:
        """The merged task vector of one parameter, of those that the coefficient multiplies.

        Raises:
            InputError: when the coefficient is 0, and the model the backbone.
        """
        if not self.scale:
            raise InputError("the model was merged at coefficient 0, so that nothing of its experts is in it; merge again")
        return self.change[key] / self.scale


class Merger(ABC):
    """A training-free merging method.

    A subclass takes its hyper-parameters, typed and validated, in ``__init__`` and keeps no other state. It sees no trainer,
    loader or path, changes no input, and draws no random number without a ``seed`` of its own.

    Attributes:
        title: the method's name in prose, such as ``"TIES-Merging"``; the class's name where it is empty.
        paper: whom to cite: authors, title, venue or arXiv number; empty where there is no paper.
        needs: what it needs besides the experts' weights, with default parameters; see :attr:`data_needs`.
        kind: what it returns.
    """

    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    needs: ClassVar[DataNeeds] = "none"
    kind: ClassVar[ModelKind] = "static"

    @abstractmethod
    def merge(self, inputs: MergeInputs) -> Merged:
        """Compute the merged model. Pull from ``inputs`` what the method needs, and nothing else."""

    @property
    def data_needs(self) -> DataNeeds:
        """What it needs with the parameters that it has: :attr:`needs`, unless a subclass overrides this.

        A method whose parameters are methods speaks for itself alone.
        """
        return self.needs

    @property
    def revisable(self) -> Revisable:
        """Whether :meth:`revise` is there, and what it needs."""
        return "no"

    def revise(self, former: Former, joining: MergeInputs, leaving: MergeInputs) -> Merged:
        """The model that :meth:`merge` would make of other experts, up to rounding, without the files of those that stay.

        Args:
            former: the model so far.
            joining: experts that join it; there may be none.
            leaving: experts that leave it; there may be none. Their files are opened when they are asked for, so a method that
                does not ask does without.

        Returns:
            The model, and what is kept of it.

        Raises:
            InputError: when what was kept does not suffice.
        """
        raise NotImplementedError(f"{type(self).__name__} merges all experts at once")


def summed(inputs: MergeInputs, scale: float = 0.3) -> Merged:
    """Task arithmetic, on which methods build by default: ``Σ_t τ_t`` at a coefficient."""
    return Merged(inputs.spread(lambda key: inputs.deltas(key).sum(0), inputs.base, "merging"), scale=scale)


def revised_mean(mean: Tensor, key: str, former: Former, joining: MergeInputs, leaving: MergeInputs) -> Tensor:
    """The mean of a parameter's task vectors after experts joined and left, by what it was before."""
    total = len(former.tasks) * mean + joining.deltas(key).sum(0) - leaving.deltas(key).sum(0)
    return total / (len(former.tasks) + len(joining.tasks) - len(leaving.tasks))


def add_up(totals: dict[str, Parts], parts: Mapping[str, Parts]) -> None:
    """Add tensors by key to the totals, which take over those of a key's first part."""
    for key, part in parts.items():
        if key not in totals:
            totals[key] = part
        else:
            for tensor, more in zip(totals[key], part, strict=True):
                tensor.add_(more)


def check_options(merger: Merger, **options: Any) -> None:
    """Check parameters that must be one of a few words.

    Args:
        merger: whose parameters they are.
        options: parameter -> ``Literal`` of the words.

    Raises:
        InputError: for the first that is none of its words.
    """
    for name, words in options.items():
        value = getattr(merger, name)
        if value not in get_args(words):
            raise InputError(f"{type(merger).__name__}: {name} is {value!r}, but must be one of {', '.join(get_args(words))}")


def check_whole(merger: Merger, least: int, *names: str, others: str = "") -> None:
    """Check parameters that must be whole numbers.

    Args:
        merger: whose parameters they are.
        least: the least number that is allowed.
        names: of the parameters.
        others: what ``None`` stands for, where that is allowed too.

    Raises:
        InputError: for the first that is anything else.
    """
    for name in names:
        value = getattr(merger, name)
        if not (type(value) is int and value >= least) and not (others and value is None):
            more = f", or null for {others}" if others else ""
            raise InputError(f"{type(merger).__name__}: {name} is {value!r}, but must be a whole number, {least} or more{more}")


def check_kinds(merger: Merger, kinds: Sequence[LinearKind]) -> None:
    """Check a parameter that names kinds of Linear layers, at least one.

    Raises:
        InputError: when there is none, or a kind is unknown.
    """
    if not kinds or not set(kinds) <= set(get_args(LinearKind)):
        raise InputError(f"{type(merger).__name__}: {_not_kinds(kinds)}")


def check_rank(merger: Merger, others: str, rank: int | str | None, floor: float = 0.0) -> None:
    """Check a parameter ``rank`` that may be "energy" besides a number, and the ``floor`` of ranks by energy.

    Args:
        merger: whose parameters they are.
        others: what the rank may be besides a number, for the message.
        rank: a whole number from 1 on, "energy", or ``None`` for the method's own.
        floor: a share in [0, 1].

    Raises:
        InputError: for anything else.
    """
    name = type(merger).__name__
    if not (rank == "energy" or (rank is None and "null" in others) or (type(rank) is int and rank >= 1)):
        raise InputError(f"{name}: rank is {rank!r}, but must be a whole number, 1 or more, or {others}")
    if not 0 <= floor <= 1:
        raise InputError(f"{name}: floor is {floor}, but must be a share of the default rank in [0, 1]")


def static_base(inputs: MergeInputs, base: Merger | None) -> Merged:
    """What a method builds on that takes a ``base``: that merger's static model, or the sum of the task vectors.

    Raises:
        InputError: when the base has routed or compressed experts.
    """
    if base is None:
        return summed(inputs)
    _check_static(base, routed=base.kind == "dynamic", compressed=base.kind == "oracle")
    merged = base.merge(inputs)
    _check_static(base, bool(merged.routed), bool(merged.experts))  # a plugin may say that it is static, and not be
    return merged


def _check_static(base: Merger, routed: bool, compressed: bool) -> None:
    if routed or compressed:
        how = "routed" if routed else "compressed"
        raise InputError(f"base {type(base).__name__} has {how} experts itself; take a static one")


def settled(inputs: MergeInputs, merged: Merged) -> Merged:
    """A merged model at the coefficient at which it is used, which nothing changes anymore."""
    scale = inputs.coefficient(merged)
    update, factors = dict(merged.update), {key: merged.coefficient(key, scale) for key in merged.update}
    del merged  # where nobody else holds them, its tensors go one by one
    for key, factor in factors.items():
        update[key] = factor * update[key]
    return Merged(update, scale, fixed=frozenset(update))


def _add_up(total: Tensor, terms: Sequence[Tensor], scale: int = 1) -> None:
    """Add float32 tensors of the shape of a float64 one to it, times ``scale``; on a CPU piece by piece."""
    size = IN_CACHE if total.device.type == "cpu" else total.numel()  # elsewhere each piece would have to be started
    for entries, *parts in zip(*(torch.split(tensor.reshape(-1), size) for tensor in (total, *terms)), strict=True):
        for part in parts:
            entries.add_(part, alpha=scale)


def merged_weights(base: Weights, merged: Merged, scale: float | None = None, release: bool = False) -> dict[str, Tensor]:
    """The merged model's weights, ``W_0 + c * update`` with ``c`` the scale, or 1 for fixed keys; float32.

    Args:
        base: pre-trained weights.
        merged: what a merger returned.
        scale: scaling coefficient; ``None`` takes the merger's own.
        release: take each task vector out of ``merged.update``, where that is a dict, once it is added: memory for one model is
            enough then.
    """
    weights = {}
    for key, value in base.items():
        update = merged.update.get(key)
        weights[key] = value if update is None else update.mul(merged.coefficient(key, scale)).add_(value.to(update.device))
        if release and update is not None and isinstance(merged.update, dict):
            del update, merged.update[key]
            release_freed_memory()  # other threads made it, from whose memory none is taken here
    return weights
