"""What methods with routed experts share: routers fitted to proxy images or task vectors, and which layers decide."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.functional.linalg import pad_rank, top_svd
from mergekit_vision.functional.routing import (
    Axes,
    PooledTokens,
    Pooling,
    TokenMoments,
    calibrate,
    discriminant,
    subspaces,
)
from mergekit_vision.functional.threads import in_threads
from mergekit_vision.merger import LinearInfo, Merged, MergeInputs, Observer
from mergekit_vision.routers import CosineRouter, Evidence, HeldRouter, LinearRouter, LowRankExperts, Router, SubspaceRouter

Rule = Literal["cosine", "centered", "discriminant", "mass", "sim"]
Decision = Literal["layer", "branch", "sum", "hold", "once"]

Features = Mapping[str, list[Tensor]]
"""Linear name -> for each task, the pooled inputs of its proxy images, ``[n_t, f]``."""

AxesOf = Mapping[str, Axes]
"""Linear name -> principal axes of its input tokens."""


@dataclass(frozen=True)
class RouterFit:
    """How a method's routers are fitted: without training, and so that they score each image on its own.

    Attributes:
        method: the method's name, for messages.
        rule: "cosine" to the prototypes, the means of each task's features; "centered", the same after subtracting the mean of
            the prototypes; "discriminant", the log-posteriors of a linear discriminant with a shared, shrunk covariance; "mass",
            the distance from the leading right singular vectors of each task vector (arXiv 2504.05342), without features; "sim",
            that from the mean and leading principal directions of each task's features (arXiv 2606.22589).
        pooling: the features, as for :func:`~mergekit_vision.functional.routing.pool_tokens`. "mass" takes the mean or the first
            token, the cosine the mean.
        gate_rank: directions that "mass" and "sim" measure distances from. ``None`` is ``min(d_out, d_in) // T`` for "mass" and 8
            for "sim".
        shrinkage: of the discriminant's covariance towards its diagonal, above 0 and at most 1.
        top_k: experts an image mixes.
        temperature: of the softmax that weights them. ``None`` takes, in each layer, the one at which the discriminant is the
            best judge of proxy images that were left out of it.

    Raises:
        InputError: for what is out of range, or does not fit the rule.
    """

    method: str
    rule: Rule = "cosine"
    pooling: tuple[Pooling, ...] = ("mean",)
    gate_rank: int | None = None
    shrinkage: float = 0.5
    top_k: int = 1
    temperature: float | None = 1.0

    def __post_init__(self) -> None:
        name, pooling = self.method, tuple(self.pooling)
        if not (0 < self.shrinkage <= 1 and (self.temperature is None or 0 < self.temperature < math.inf)):
            raise InputError(
                f"{name}: shrinkage is {self.shrinkage} and temperature {self.temperature}, "
                "but shrinkage must be above 0 and at most 1, temperature a finite number above 0"
            )
        if self.temperature is None and self.rule != "discriminant":
            raise InputError(f"{name}: temperature null is for rule discriminant; give a number")
        if not pooling or not set(pooling) <= set(get_args(Pooling)):
            raise InputError(f"{name}: pooling is {list(pooling)}, but must name some of {', '.join(get_args(Pooling))}")
        if pooling != ("mean",) and self.rule in ("cosine", "centered"):
            raise InputError(f"{name}: pooling {list(pooling)} needs rule discriminant; the cosine is of the mean token")
        if self.rule == "mass" and pooling not in (("mean",), ("first",)):
            raise InputError(f"{name}: pooling is {list(pooling)}, but rule mass takes either [mean] or [first]")
        if self.gate_rank is not None and self.rule not in ("mass", "sim"):
            raise InputError(f"{name}: gate_rank is {self.gate_rank}, but goes with rule mass or sim only, not with {self.rule}")
        if self.rule == "sim" and "covariance" in pooling:
            raise InputError(f"{name}: pooling is {list(pooling)}, but covariance is for rule discriminant")

    def axes(self, inputs: MergeInputs, names: Sequence[str], model: Merged | None) -> AxesOf:
        """Axes of the layers' inputs in ``model``, or in the experts; none where the covariance is not asked for."""
        if "covariance" not in self.pooling:
            return {}
        moments = {name: TokenMoments() for name in names}
        for task in inputs.track(inputs.tasks, "axes"):
            inputs.observe(task, moments, model)
        return {name: moment.axes() for name, moment in moments.items()}

    def observers(
        self, names: Sequence[str], axes: AxesOf, then: Mapping[str, Observer] | None = None
    ) -> dict[str, PooledTokens]:
        """Observers that keep the features of each image, and pass the layers' inputs on to ``then``."""
        return {name: PooledTokens(self.pooling, axes.get(name), (then or {}).get(name)) for name in names}

    def features(self, inputs: MergeInputs, names: Sequence[str], model: Merged, axes: AxesOf) -> Features:
        """Features of the layers' inputs in ``model``."""

        def pooled(task: str) -> dict[str, Tensor]:
            pools = self.observers(names, axes)
            inputs.observe(task, pools, model)
            return {name: pool.features for name, pool in pools.items()}

        found = list(inputs.spread(pooled, inputs.tasks, "routing").values())
        return {name: [features[name] for features in found] for name in names}

    def of_features(self, features: Features, axes: AxesOf) -> dict[str, Router]:
        """A router for each layer."""
        return {name: self._router(groups, axes.get(name)) for name, groups in features.items()}

    def of_task_vectors(self, inputs: MergeInputs, linears: Sequence[LinearInfo]) -> dict[str, Router]:
        """A router for each layer, by rule "mass"."""
        assert self.temperature is not None

        def basis(key: str) -> Tensor:
            full = min(inputs.base[key].shape)
            rank = min(full, self.gate_rank or max(1, full // len(inputs.tasks)))
            return torch.stack(
                in_threads(lambda task: pad_rank(top_svd(inputs.delta(task, key), rank).Vh, rank, 0), inputs.tasks)
            )

        bases = inputs.spread(basis, [linear.weight for linear in linears], "routing")
        options = (None, self.pooling, self.top_k, self.temperature)
        return {linear.name: SubspaceRouter(bases[linear.weight], *options) for linear in linears}

    def _router(self, features: list[Tensor], axes: Axes | None) -> Router:
        if self.rule == "discriminant":
            fit = discriminant(features, self.shrinkage)
            temperature = calibrate(fit.left_out, fit.labels) if self.temperature is None else self.temperature
            basis, offset = (None, None) if axes is None else (axes.basis, axes.offset)
            return LinearRouter(fit.weight.float(), fit.bias.float(), self.pooling, basis, offset, self.top_k, temperature)
        assert self.temperature is not None
        if self.rule == "sim":
            basis, center = (part.float() for part in subspaces(features, self.gate_rank or 8))
            return SubspaceRouter(basis, center, self.pooling, self.top_k, self.temperature)
        prototypes = torch.stack([group.double().mean(0) for group in features]).float()
        return CosineRouter(prototypes, prototypes.mean(0) if self.rule == "centered" else None, self.top_k, self.temperature)


def check_held_layer(method: str, decision: Decision, held_layer: int | None) -> None:
    """Refuse a ``held_layer`` below 0, or that the decision would ignore.

    Raises:
        InputError: for one that is given where the decision is neither "hold" nor "once".
    """
    if held_layer is not None and held_layer < 0:
        raise InputError(f"{method}: held_layer is {held_layer}, but must be at least 0")
    if held_layer is not None and decision not in ("hold", "once"):
        raise InputError(f"{method}: held_layer is {held_layer}, which decision {decision} does not use")


def evidence_of(method: str, decision: Decision, held_layer: int | None, linears: Sequence[LinearInfo]) -> list[Evidence]:
    """How each routed layer comes to its decision.

    Args:
        method: the method's name, for messages.
        decision: each "layer" by its own scores; each "branch" of a block, attention or MLP, by the scores of its first routed
            layer; by the "sum" of the scores of all layers so far; the layers from ``held_layer`` on "hold" its decision; or all
            decide "once" for an image, by the scores that ``held_layer`` gives in a run of the base ahead.
        held_layer: index among the layers. ``None`` is the first, for "hold"; for "once", the scores of all are added up.
        linears: the routed layers, in forward order.

    Raises:
        InputError: for an index that "hold" or "once" does not find.
    """
    count = len(linears)
    if decision == "layer":
        return ["own"] * count
    if decision == "sum":
        return ["add" if at else "start" for at in range(count)]
    if decision == "branch":
        branches = [None, *((linear.block, linear.kind in ("in_proj", "out_proj")) for linear in linears)]
        return ["hold" if branch == last else "start" for last, branch in pairwise(branches)]
    if held_layer is not None and not 0 <= held_layer < count:
        raise InputError(f"{method}: held_layer is {held_layer}, but there are {count} routed layers, from 0 on")
    if decision == "once":
        return ["ahead" if held_layer in (None, at) else "hold" for at in range(count)]
    first = held_layer or 0
    return ["own" if at < first else "start" if at == first else "hold" for at in range(count)]


def deciding(linears: Sequence[LinearInfo], evidence: Sequence[Evidence]) -> list[LinearInfo]:
    """The layers that have scores of their own."""
    return [linear for linear, use in zip(linears, evidence, strict=True) if use != "hold"]


def routed(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    routers: Mapping[str, Router],
    evidence: Sequence[Evidence],
    biases: Mapping[str, Tensor] | None = None,
) -> dict[str, LowRankExperts]:
    """Experts with routers; a layer that holds the decision of another mixes the experts as that one does.

    Args:
        factors: Linear name -> ``up [T, d_out, r]`` and ``down [T, r, d_in]``, in forward order.
        routers: of the layers that decide.
        evidence: of each layer.
        biases: ``[T, d_out]`` of the layers whose experts have one.
    """
    experts: dict[str, LowRankExperts] = {}
    last = next(iter(routers.values()))
    for (name, (up, down)), use in zip(factors.items(), evidence, strict=True):
        last = routers.get(name, last)
        router = HeldRouter(len(up), last.top_k, last.temperature) if use == "hold" else last
        experts[name] = LowRankExperts(up, down, router, (biases or {}).get(name), use)
    return experts
