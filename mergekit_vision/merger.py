"""The contract of a merging method: :class:`MergeInputs` goes in, :class:`Merged` comes out of a :class:`Merger`.

This file is all that the author of a plugin has to read.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, get_args

import torch
from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.routers import LowRankExperts
from mergekit_vision.support.allocator import release_freed_memory

Weights = Mapping[str, Tensor]
"""Key of a parameter of the vision tower (``visual.…``) -> tensor. Lazy: a tensor is read when it is asked for."""

Observer = Callable[[Tensor], None]
"""Receives one layer's input for one batch of images: ``[images, tokens, d_in]``, float32, on the merging device."""

Spread = Callable[[Callable[[str], Any], Mapping[str, int], str], dict[str, Any]]
"""Computes a function of named items of known cost, with a description of the work, and returns all results."""

_Result = TypeVar("_Result")


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


def linears_of_kind(linears: Iterable[LinearInfo], kinds: Sequence[LinearKind]) -> list[LinearInfo]:
    """Those of the ``linears`` whose kind is one of ``kinds``, in their order.

    Raises:
        InputError: when there is none, or a kind is unknown.
    """
    chosen = [linear for linear in linears if linear.kind in kinds]
    if not chosen or not set(kinds) <= set(get_args(LinearKind)):
        raise InputError(f"layers is {list(kinds)}, but must name some of {', '.join(get_args(LinearKind))}")
    return chosen


class RunProxies(Protocol):
    """Runs one task's proxy images through its expert, or through ``model``, with observers on named Linear layers."""

    def __call__(self, task: str, observers: Mapping[str, Observer], model: "Merged | None") -> None:
        """Run them; see :meth:`MergeInputs.observe`."""


def _untracked(items: Iterable[str], description: str) -> Iterable[str]:
    return items


def _alone(function: Callable[[str], Any], items: Mapping[str, int], description: str) -> dict[str, Any]:
    return {item: function(item) for item in items}


@dataclass(frozen=True)
class MergeInputs:
    """What a merger may use: the backbone, the experts and, on demand, the activations on proxy images.

    Attributes:
        base: weights of the pre-trained vision tower.
        experts: task -> weights with the keys and shapes of ``base``, in the order of the suite.
        linears: the encoder's Linear layers in forward order.
        device: where deltas are put and merging computes.
        run_proxies: behind :meth:`observe`; ``None`` where there are no proxy images.
        choose_scale: behind :meth:`coefficient`; ``None`` takes the merger's own.
        track: wraps a loop in a progress bar: ``for key in inputs.track(keys, "merging"):``.
        share: behind :meth:`spread`.
    """

    base: Weights
    experts: Mapping[str, Weights]
    linears: tuple[LinearInfo, ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    run_proxies: RunProxies | None = None
    choose_scale: "Callable[[Merged], float] | None" = None
    track: Callable[[Iterable[str], str], Iterable[str]] = _untracked
    share: Spread = _alone

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of the suite."""
        return tuple(self.experts)

    def delta(self, task: str, key: str) -> Tensor:
        """Task vector of one parameter: fine-tuned minus pre-trained; float32, new memory, on ``device``.

        Raises:
            InputError: when the expert holds NaN or infinity there.
        """
        return self._expert(task, key) - self.base[key].to(self.device, torch.float32)

    def deltas(self, key: str) -> Tensor:
        """Task vectors of one parameter for all tasks, ``[T, *shape]`` in the order of :attr:`tasks`; float32, new memory."""
        stack = torch.stack([self._expert(task, key) for task in self.tasks])
        return stack.sub_(self.base[key].to(self.device, torch.float32))

    def changed(self, task: str, key: str) -> bool:
        """Whether fine-tuning changed a parameter at all; cheaper than its task vector."""
        expert, base = (weights[key].to(self.device, torch.float32) for weights in (self.experts[task], self.base))
        return not torch.equal(expert, base)

    def _expert(self, task: str, key: str) -> Tensor:
        value = self.experts[task][key].to(self.device, torch.float32)
        # one pass and no copy: the largest magnitude is NaN if any entry is
        if value.numel() and not torch.linalg.vector_norm(value, torch.inf).isfinite():
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
            raise InputError("this merging method needs proxy images, but none are configured (see `proxies` of the data module)")
        names = [linear.name for linear in self.linears]
        unknown = [name for name in observers if name not in names]
        if unknown:
            raise InputError(f"not a Linear layer of this encoder: {', '.join(unknown)}; its layers are {', '.join(names)}")
        self.run_proxies(task, observers, model)

    def spread(self, function: Callable[[str], _Result], items: Iterable[str], description: str) -> dict[str, _Result]:
        """``function`` of every item, as :attr:`track` shows it; with several processes each computes a share.

        The result does not depend on the number of processes, and every process gets all of it. ``function`` may call
        :meth:`observe`, and nothing that needs the other processes: not :meth:`coefficient`, not :meth:`spread` again.

        Args:
            function: of a task's name or a parameter's key, giving tensors, numbers, or collections of them.
            items: tasks, or keys of :attr:`base`; these are shared out by size.
            description: what the progress bar says.
        """

        def compute(item: str) -> _Result:
            try:
                return function(item)
            finally:
                release_freed_memory()

        return self.share(compute, {item: self.base[item].numel() if item in self.base else 1 for item in items}, description)

    def coefficient(self, merged: "Merged") -> float:
        """The scaling coefficient at which ``merged`` is to be used: the user's number, the searched one, or its own."""
        return merged.scale if self.choose_scale is None else self.choose_scale(merged)


@dataclass(frozen=True)
class Merged:
    """A merged model as data: ``W = W_0 + scale * update``.

    Attributes:
        update: the merged task vector, key -> float32 tensor. A key that is absent keeps its pre-trained value.
        scale: scaling coefficient, unless the user sets or searches another.
        fixed: keys of ``update`` that are added with coefficient 1 whatever the scale.
        routed: Linear name -> low-rank experts added to that layer's output, chosen per image or token.
    """

    update: Weights
    scale: float = 1.0
    fixed: frozenset[str] = frozenset()
    routed: Mapping[str, LowRankExperts] = field(default_factory=dict)

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


class Merger(ABC):
    """A training-free merging method.

    A subclass takes its hyper-parameters, typed and validated, in ``__init__`` and keeps no other state. It sees no trainer,
    loader or path, changes no input, and draws no random number without a ``seed`` of its own.

    Attributes:
        title: the method's name in prose, such as ``"TIES-Merging"``; the class's name where it is empty.
        paper: whom to cite: authors, title, venue or arXiv number; empty where there is no paper.
        needs: what it needs besides the experts' weights: ``"none"``, unlabeled ``"proxies"``, or ``"labels"``.
        kind: what it returns: one plain encoder (``"static"``), or one with routed experts (``"dynamic"``).
    """

    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    needs: ClassVar[Literal["none", "proxies", "labels"]] = "none"
    kind: ClassVar[Literal["static", "dynamic"]] = "static"

    @abstractmethod
    def merge(self, inputs: MergeInputs) -> Merged:
        """Compute the merged model. Pull from ``inputs`` what the method needs, and nothing else."""


def merged_weights(base: Weights, merged: Merged, scale: float | None = None) -> dict[str, Tensor]:
    """The merged model's weights, ``W_0 + c * update`` with ``c`` the scale, or 1 for fixed keys; float32.

    Args:
        base: pre-trained weights.
        merged: what a merger returned.
        scale: scaling coefficient; ``None`` takes the merger's own.
    """
    weights = {}
    for key, value in base.items():
        update = merged.update.get(key)
        weights[key] = value if update is None else update.mul(merged.coefficient(key, scale)).add_(value.to(update.device))
    return weights
