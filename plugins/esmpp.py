"""ESM++: a merged base plus low-rank experts, one chosen per image in every routed layer."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.fitting import Decision, Features, RouterFit, Rule, check_held_layer, deciding, evidence_of, routed
from mergekit_vision.functional.esd import CompactSubspace, ShiftStatistic
from mergekit_vision.functional.linalg import pad_rank
from mergekit_vision.functional.ranks import share_out
from mergekit_vision.functional.routing import PooledTokens, Pooling
from mergekit_vision.functional.threads import in_threads
from mergekit_vision.merger import (
    DataNeeds,
    LinearInfo,
    LinearKind,
    Merged,
    MergeInputs,
    Merger,
    ModelKind,
    Observer,
    check_kinds,
    check_options,
    check_rank,
    check_whole,
    linears_of_kind,
    settled,
    static_base,
)
from mergekit_vision.routers import Router

Statistics = Literal["experts", "base", "routed"]

Subspaces = dict[str, list[CompactSubspace]]
"""Linear name -> essential subspace of each task."""

Observers = Callable[[Mapping[str, Observer]], dict[str, PooledTokens]]
"""What pools the inputs of layers, and passes them on to the observers that it is given."""


@dataclass(frozen=True)
class ESMPP(Merger):
    """A merged base plus low-rank experts of what it misses, chosen per image in each layer.

    Source: the extended paper of Essential Subspace Merging (arXiv 2606.19164). In each routed layer the residual of expert
    ``t`` against the merged base (at the coefficient at which it is used) keeps its ``rank`` essential directions on the
    task's proxy images. An image takes the expert whose prototype, the mean of the expert's own layer inputs, is nearest by
    cosine to the mean of its tokens; each layer decides for itself. The remaining arguments vary that rule; all variants are
    training-free and decide for each image on its own.

    Args:
        base: merges the base; ESM with its defaults where ``None``. With scaling coefficient 0, :class:`TaskArithmetic` makes it
            the backbone.
        rank: of the experts. With "energy" each has its own in each layer, within ``megabytes``: the directions of all are taken
            in the order of their share of the residual's activation shift a byte, after one of each.
        layers: which Linear layers of each block are routed.
        rule: "cosine" to the prototypes (published); "centered", the same after subtracting the mean of the prototypes;
            "discriminant", the log-posteriors of a linear discriminant with a shared, shrunk covariance; "mass", the distance
            from the leading right singular vectors of each task vector (arXiv 2504.05342), without statistics; "sim", that from
            the mean and leading principal directions of each task's pooled inputs (arXiv 2606.22589).
        statistics: whose inputs on the proxy images the rule is fitted to: the "experts'" own (published), the merged "base"'s,
            or the "routed" model's, itself routed by a rule fitted to the base.
        decision: each "layer" by its own scores (published); each "branch" of a block, attention or MLP, by the scores of its
            first routed layer; by the "sum" of the scores of all layers so far; or the layers from ``held_layer`` on "hold" the
            decision of that layer. Or all layers decide "once" for an image: by the scores that ``held_layer`` gives in a run of
            the base ahead.
        held_layer: index among the routed layers. ``None`` is the first, for "hold"; for "once", the scores of all are added up.
        pooling: what "discriminant" and "sim" know of an image: the "mean" over its tokens, their standard "deviation", the
            "first" (class) token, their "covariance" along the 32 principal axes of all tasks' tokens (discriminant only), side
            by side. "mass" takes the mean or, as published, the first token; the cosine takes the mean.
        gate_rank: directions of each expert that "mass" and "sim" measure distances from. ``None`` is ``min(d_out, d_in) // T``
            for "mass", as published, and 8 for "sim".
        shrinkage: of the discriminant's covariance towards its diagonal, above 0 and at most 1.
        top_k: experts an image mixes, weighted by the softmax of their scores over ``temperature``.
        temperature: of that softmax. ``None`` takes, in each layer, the one at which the discriminant is the best judge of proxy
            images that were left out of it, one by one and in closed form.
        megabytes: what the experts of all tasks may take with rank "energy", as float32 and in millions of bytes. ``None`` is
            what rank 32 takes.
    """

    title: ClassVar[str] = "ESM++"
    paper: ClassVar[str] = "Essential Subspace Merging, CVPR 2026, and its extended version, 2026, arXiv:2606.19164"
    needs: ClassVar[DataNeeds] = "proxies"
    kind: ClassVar[ModelKind] = "dynamic"

    base: Merger | None = None
    rank: int | Literal["energy"] = 32
    layers: tuple[LinearKind, ...] = ("in_proj", "c_fc")
    rule: Rule = "cosine"
    statistics: Statistics = "experts"
    decision: Decision = "layer"
    held_layer: int | None = None
    pooling: tuple[Pooling, ...] = ("mean",)
    gate_rank: int | None = None
    shrinkage: float = 0.5
    top_k: int = 1
    temperature: float | None = 1.0
    megabytes: float | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_rank(self, "energy", self.rank)
        if self.megabytes is not None and not (self.rank == "energy" and 0 < self.megabytes < 1e12):
            raise InputError(
                f"{name}: megabytes is {self.megabytes}, but must be above 0 and below 1e12, and goes with rank energy only"
            )
        check_whole(self, 1, "top_k")
        check_whole(self, 1, "gate_rank", others="min(d_out, d_in) // T")
        check_kinds(self, self.layers)
        check_options(self, rule=Rule, statistics=Statistics, decision=Decision)
        check_held_layer(name, self.decision, self.held_layer)
        self._fit()
        summed = self.decision == "sum" or (self.decision == "once" and self.held_layer is None)
        if self.temperature is None and summed:
            raise InputError(
                f"{name}: temperature null is for rule discriminant, and not for decision sum, or once without held_layer; "
                "give a number"
            )
        if self.decision == "once" and self.statistics == "routed":
            raise InputError(f"{name}: decision once looks at the base, so statistics must be base or experts, not routed")

    def _fit(self) -> RouterFit:
        name = type(self).__name__
        return RouterFit(name, self.rule, self.pooling, self.gate_rank, self.shrinkage, self.top_k, self.temperature)

    def merge(self, inputs: MergeInputs) -> Merged:
        """Merge the base, decompose the residuals, fit the routers."""
        linears, fit = linears_of_kind(inputs.linears, self.layers), self._fit()
        budget = _budget(self, inputs, linears)
        evidence = evidence_of(fit.method, self.decision, self.held_layer, linears)
        scoring = deciding(linears, evidence)
        names = [linear.name for linear in scoring]
        base = self._merged_base(inputs)
        axes = fit.axes(inputs, names, None if self.statistics == "experts" else base)
        residuals = _Residuals(inputs, base, linears)
        rank = None if self.rank == "energy" else self.rank
        subspaces, features = residuals.subspaces(rank, partial(fit.observers, names, axes))
        factors = residuals.factors(subspaces if budget is None else residuals.within(budget, subspaces), rank)

        def model(routers: Mapping[str, Router]) -> Merged:
            return replace(base, routed=routed(factors, routers, evidence))

        if self.rule == "mass":
            return model(fit.of_task_vectors(inputs, scoring))
        if self.statistics != "experts":
            features = fit.features(inputs, names, base, axes)
        merged = model(fit.of_features(features, axes))
        if self.statistics == "routed":
            merged = model(fit.of_features(fit.features(inputs, names, merged, axes), axes))
        return merged

    def _merged_base(self, inputs: MergeInputs) -> Merged:
        """The base at its final coefficient, which nothing changes anymore."""
        from .esm import ESM  # here, as only the default depends on another plugin

        return settled(inputs, static_base(inputs, ESM() if self.base is None else self.base))


@dataclass(frozen=True)
class ESMPPBayes(ESMPP):
    """ESM++ with a linear discriminant fitted to the merged base's own activations; mixes the two best experts.

    The prototypes of :class:`ESMPP` come from the experts' activations and share a large common component. This variant fits,
    on the same proxy images run twice more through the merged base, a linear discriminant with a shrunk covariance to the
    mean, deviation and covariance of the tokens of each layer's input and its class token. It mixes the two most probable
    experts, so that a doubtful image is not handed to a wrong one alone; how doubtful an image is, the proxy images say that
    are left out. Still without training, and for each image on its own.

    Args:
        base: as for :class:`ESMPP`.
        rank: as for :class:`ESMPP`.
        layers: as for :class:`ESMPP`.
        rule: as for :class:`ESMPP`.
        statistics: as for :class:`ESMPP`.
        decision: as for :class:`ESMPP`.
        held_layer: as for :class:`ESMPP`.
        pooling: as for :class:`ESMPP`.
        gate_rank: as for :class:`ESMPP`.
        shrinkage: as for :class:`ESMPP`.
        top_k: as for :class:`ESMPP`.
        temperature: as for :class:`ESMPP`. Proxy images are few, so that log-posteriors are too sure of themselves, and the more
            so the fewer they are, which no constant corrects.
        megabytes: as for :class:`ESMPP`.
    """

    title: ClassVar[str] = "ESM++ with a Bayes router"

    rule: Rule = "discriminant"
    statistics: Statistics = "base"
    decision: Decision = "branch"
    pooling: tuple[Pooling, ...] = ("mean", "deviation", "first", "covariance")
    top_k: int = 2
    temperature: float | None = None


@dataclass(frozen=True)
class _Residuals:
    """What a merged base misses of the experts' matrices in the routed layers."""

    inputs: MergeInputs
    base: Merged
    linears: Sequence[LinearInfo]

    def of(self, task: str, key: str) -> Tensor:
        """One residual, ``[d_out, d_in]``; new memory."""
        delta = self.inputs.delta(task, key)
        return delta.sub_(self.base.update[key].to(delta.device)) if key in self.base.update else delta

    def subspaces(self, rank: int | None, observers: Observers) -> tuple[Subspaces, Features]:
        """Their essential subspaces, whole where ``rank`` is ``None``; and the experts' features."""
        names = [linear.name for linear in self.linears]
        shapes = {linear: self.inputs.base[linear.weight].shape for linear in self.linears}

        def expert(task: str) -> tuple[list[CompactSubspace], dict[str, Tensor]]:
            shifts = {
                linear.name: ShiftStatistic(partial(self.of, task, linear.weight), shape) for linear, shape in shapes.items()
            }
            pools = observers(shifts)
            self.inputs.observe(task, {**shifts, **pools})

            def decompose(linear: LinearInfo) -> CompactSubspace:
                try:
                    return shifts.pop(linear.name).compact(rank or shapes[linear][0])
                except ValueError as error:
                    raise InputError(f"expert of task {task}, layer {linear.name}: {error}") from error

            found = in_threads(decompose, self.linears)
            return found, {name: pool.features for name, pool in pools.items()}

        found, features = zip(*self.inputs.spread(expert, self.inputs.tasks, "experts").values(), strict=True)
        layers = (list(layer) for layer in zip(*found, strict=True))
        return dict(zip(names, layers, strict=True)), {name: [part[name] for part in features] for name in features[0]}

    def within(self, budget: int, subspaces: Subspaces) -> Subspaces:
        """The directions of most energy a byte that a budget in bytes allows, and at least one of each expert and layer."""
        prices = [_price(self.inputs, linear) for linear in self.linears for _ in self.inputs.tasks]
        energies = [subspace.eigenvalues for layer in subspaces.values() for subspace in layer]
        ranks = iter(share_out(energies, budget, floor=1, costs=prices))
        return {name: [subspace.leading(next(ranks)) for subspace in layer] for name, layer in subspaces.items()}

    def factors(self, subspaces: Subspaces, rank: int | None) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each layer, ``up [T, d_out, r]`` and ``down [T, r, d_in]``; ``r`` is the largest rank where none is given."""
        names = {linear.weight: linear.name for linear in self.linears}

        def layer(key: str) -> tuple[Tensor, Tensor]:
            parts = subspaces[names[key]]
            r = min(rank or max(1, *(len(part.eigenvalues) for part in parts)), *self.inputs.base[key].shape)

            def expert(task: str, subspace: CompactSubspace) -> tuple[Tensor, Tensor]:
                delta = self.of(task, key)
                up = subspace.of(delta).directions
                return pad_rank(up, r, 1), pad_rank((up.double().T @ delta.double()).float(), r, 0)

            pairs = zip(self.inputs.tasks, parts, strict=True)
            up, down = zip(*in_threads(lambda pair: expert(*pair), pairs), strict=True)
            return torch.stack(up), torch.stack(down)

        return {names[key]: pair for key, pair in self.inputs.spread(layer, names, "factors").items()}


def _price(inputs: MergeInputs, linear: LinearInfo) -> int:
    """Bytes of one direction of one expert, float32."""
    return 4 * sum(inputs.base[linear.weight].shape)


def _budget(method: ESMPP, inputs: MergeInputs, linears: Sequence[LinearInfo]) -> int | None:
    """Bytes of all experts, enough for one direction of each in every layer; ``None`` where the rank is given."""
    if method.rank != "energy":
        return None
    least = len(inputs.tasks) * sum(_price(inputs, linear) for linear in linears)
    budget = 32 * least if method.megabytes is None else int(1e6 * method.megabytes)
    if budget < least:
        problem = f"one direction of each expert in {len(linears)} layers takes {math.ceil(least / 1e4) / 100}"
        raise InputError(f"{type(method).__name__}: megabytes is {method.megabytes}, but {problem}; give more, or fewer layers")
    return budget
