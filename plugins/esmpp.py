"""ESM++: a merged base plus low-rank experts, one chosen per image in every routed layer."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.functional.esd import ShiftStatistic
from mergekit_vision.functional.linalg import pad_rank, top_svd
from mergekit_vision.functional.routing import Axes, PooledTokens, Pooling, calibrate, discriminant, principal_axes, subspaces
from mergekit_vision.functional.threads import in_threads
from mergekit_vision.merger import (
    DataNeeds,
    LinearInfo,
    LinearKind,
    Merged,
    MergeInputs,
    Merger,
    ModelKind,
    check_options,
    linears_of_kind,
    settled,
    static_base,
)
from mergekit_vision.routers import (
    CosineRouter,
    Evidence,
    HeldRouter,
    LinearRouter,
    LowRankExperts,
    Router,
    SubspaceRouter,
    check_held_layer,
    decided_ahead,
)

Rule = Literal["cosine", "centered", "discriminant", "mass", "sim"]
Statistics = Literal["experts", "base", "routed"]
Decision = Literal["layer", "branch", "sum", "hold", "once"]

Features = Mapping[str, list[Tensor]]
"""Linear name -> for each task, the pooled inputs of its proxy images, ``[n_t, f]``."""

AxesOf = Mapping[str, Axes]
"""Linear name -> principal axes of its input tokens."""


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
        rank: of the experts.
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
    """

    title: ClassVar[str] = "ESM++"
    paper: ClassVar[str] = "Essential Subspace Merging, CVPR 2026, and its extended version, 2026, arXiv:2606.19164"
    needs: ClassVar[DataNeeds] = "proxies"
    kind: ClassVar[ModelKind] = "dynamic"

    base: Merger | None = None
    rank: int = 32
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

    def __post_init__(self) -> None:
        name = type(self).__name__
        for argument, least in (("rank", 1), ("top_k", 1), ("held_layer", 0), ("gate_rank", 1)):
            value = getattr(self, argument)
            if value is not None and value < least:
                raise InputError(f"{name}: {argument} is {value}, but must be at least {least}")
        if not (0 < self.shrinkage <= 1 and (self.temperature is None or self.temperature > 0)):
            raise InputError(
                f"{name}: shrinkage is {self.shrinkage} and temperature {self.temperature}, "
                "but shrinkage must be above 0 and at most 1, temperature above 0"
            )
        if not self.pooling or not set(self.pooling) <= set(get_args(Pooling)):
            raise InputError(f"{name}: pooling is {list(self.pooling)}, but must name some of {', '.join(get_args(Pooling))}")
        check_options(self, rule=Rule, statistics=Statistics, decision=Decision)
        if tuple(self.pooling) != ("mean",) and self.rule in ("cosine", "centered"):
            raise InputError(f"{name}: pooling {list(self.pooling)} needs rule discriminant; the cosine is of the mean token")
        if self.rule == "mass" and tuple(self.pooling) not in (("mean",), ("first",)):
            raise InputError(f"{name}: pooling is {list(self.pooling)}, but rule mass takes either [mean] or [first]")
        if self.rule == "sim" and "covariance" in self.pooling:
            raise InputError(f"{name}: pooling is {list(self.pooling)}, but covariance is for rule discriminant")
        summed = self.decision == "sum" or (self.decision == "once" and self.held_layer is None)
        if self.temperature is None and (self.rule != "discriminant" or summed):
            raise InputError(
                f"{name}: temperature null is for rule discriminant, and not for decision sum, or once without held_layer; "
                "give a number"
            )
        if self.decision == "once" and self.statistics == "routed":
            raise InputError(f"{name}: decision once looks at the base, so statistics must be base or experts, not routed")

    def merge(self, inputs: MergeInputs) -> Merged:
        """Merge the base, decompose the residuals, fit the routers."""
        linears = linears_of_kind(inputs.linears, self.layers)
        names = [linear.name for linear in linears]
        evidence = self._evidence(linears)
        base = self._merged_base(inputs)
        axes = self._axes(inputs, names, None if self.statistics == "experts" else base)
        factors, features = self._decompose(inputs, linears, base, axes)
        if self.rule == "mass":
            return replace(base, routed=_routed(factors, self._mass(inputs, linears, evidence), evidence))
        if self.statistics != "experts":
            features = self._observe(inputs, names, base, axes)
        merged = replace(base, routed=_routed(factors, self._routers(features, axes, evidence), evidence))
        if self.statistics == "routed":
            features = self._observe(inputs, names, merged, axes)
            merged = replace(base, routed=_routed(factors, self._routers(features, axes, evidence), evidence))
        return merged

    def _merged_base(self, inputs: MergeInputs) -> Merged:
        """The base at its final coefficient, which nothing changes anymore."""
        from .esm import ESM  # here, as only the default depends on another plugin

        return settled(inputs, static_base(inputs, ESM() if self.base is None else self.base))

    def _axes(self, inputs: MergeInputs, names: list[str], model: Merged | None) -> AxesOf:
        """Axes of the inputs of ``model``, or of the experts; none where the covariance is not asked for."""
        if "covariance" not in self.pooling:
            return {}
        moments = {name: _Moments() for name in names}
        for task in inputs.track(inputs.tasks, "axes"):
            inputs.observe(task, moments, model)
        return {name: moment.axes() for name, moment in moments.items()}

    def _decompose(
        self, inputs: MergeInputs, linears: list[LinearInfo], base: Merged, axes: AxesOf
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], Features]:
        """Each layer's factors ``up [T, d_out, r]`` and ``down [T, r, d_in]``, and the experts' pooled inputs."""

        def expert(task: str) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
            shifts = {
                linear.name: ShiftStatistic(
                    partial(_residual, inputs, task, linear.weight, base), inputs.base[linear.weight].shape
                )
                for linear in linears
            }
            pools = {name: PooledTokens(self.pooling, axes.get(name), shifts[name]) for name in names}
            inputs.observe(task, pools)
            factors = in_threads(lambda name: self._factors(shifts.pop(name)), names)
            return {name: (*factor, pools[name].features) for name, factor in zip(names, factors, strict=True)}

        names = [linear.name for linear in linears]
        found = list(inputs.spread(expert, inputs.tasks, "experts").values())
        ups, downs, features = ({name: [parts[name][at] for parts in found] for name in names} for at in range(3))
        return {name: (torch.stack(ups[name]), torch.stack(downs[name])) for name in names}, features

    def _factors(self, shift: ShiftStatistic) -> tuple[Tensor, Tensor]:
        """Factors of one expert's residual in one layer, ``[d_out, r]`` and ``[r, d_in]``."""
        delta, directions = shift.delta, shift.subspace(self.rank).directions
        rank = min(self.rank, *delta.shape)
        return pad_rank(directions, rank, 1), pad_rank((directions.double().T @ delta.double()).float(), rank, 0)

    def _observe(self, inputs: MergeInputs, names: list[str], model: Merged, axes: AxesOf) -> Features:
        """Pooled inputs of the merged ``model``."""

        def pooled(task: str) -> dict[str, Tensor]:
            pools = {name: PooledTokens(self.pooling, axes.get(name)) for name in names}
            inputs.observe(task, pools, model)
            return {name: pool.features for name, pool in pools.items()}

        found = list(inputs.spread(pooled, inputs.tasks, "routing").values())
        return {name: [features[name] for features in found] for name in names}

    def _routers(self, features: Features, axes: AxesOf, evidence: list[Evidence]) -> dict[str, Router]:
        """Routers fitted to pooled inputs, of the layers that have scores of their own."""
        deciding = [name for name, use in zip(features, evidence, strict=True) if use != "hold"]
        return {name: self._router(features[name], axes.get(name)) for name in deciding}

    def _mass(self, inputs: MergeInputs, linears: list[LinearInfo], evidence: list[Evidence]) -> dict[str, Router]:
        """Routers made of the task vectors' leading right singular vectors, of the layers that have scores of their own."""
        assert self.temperature is not None

        def basis(key: str) -> Tensor:
            full = min(inputs.base[key].shape)
            rank = min(full, self.gate_rank or max(1, full // len(inputs.tasks)))
            return torch.stack(
                in_threads(lambda task: pad_rank(top_svd(inputs.delta(task, key), rank).Vh, rank, 0), inputs.tasks)
            )

        deciding = [linear for linear, use in zip(linears, evidence, strict=True) if use != "hold"]
        bases = inputs.spread(basis, [linear.weight for linear in deciding], "routing")
        options = (None, self.pooling, self.top_k, self.temperature)
        return {linear.name: SubspaceRouter(bases[linear.weight], *options) for linear in deciding}

    def _evidence(self, linears: list[LinearInfo]) -> list[Evidence]:
        """How each layer comes to its decision."""
        if self.decision == "layer":
            return ["own"] * len(linears)
        if self.decision == "sum":
            return ["add" if position else "start" for position in range(len(linears))]
        if self.decision == "branch":
            branches = [None, *((linear.block, linear.kind in ("in_proj", "out_proj")) for linear in linears)]
            return ["hold" if branch == last else "start" for last, branch in pairwise(branches)]
        check_held_layer(self, self.held_layer, len(linears))
        if self.decision == "once":
            return decided_ahead(self.held_layer, len(linears))
        first = self.held_layer or 0
        return ["own" if at < first else "start" if at == first else "hold" for at in range(len(linears))]

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
    """

    title: ClassVar[str] = "ESM++ with a Bayes router"

    rule: Rule = "discriminant"
    statistics: Statistics = "base"
    decision: Decision = "branch"
    pooling: tuple[Pooling, ...] = ("mean", "deviation", "first", "covariance")
    top_k: int = 2
    temperature: float | None = None


def _routed(
    factors: Mapping[str, tuple[Tensor, Tensor]], routers: Mapping[str, Router], evidence: list[Evidence]
) -> dict[str, LowRankExperts]:
    """Factors with routers; a layer that holds the decision of another mixes the experts as that one does."""
    routed: dict[str, LowRankExperts] = {}
    deciding = next(iter(routers.values()))
    for (name, (up, down)), use in zip(factors.items(), evidence, strict=True):
        deciding = routers.get(name, deciding)
        router = HeldRouter(len(up), deciding.top_k, deciding.temperature) if use == "hold" else deciding
        routed[name] = LowRankExperts(up, down, router, evidence=use)
    return routed


class _Moments:
    """Observer that sums up first and second moments of tokens, in float64."""

    def __init__(self) -> None:
        self._first: Tensor | float = 0.0
        self._second: Tensor | float = 0.0
        self._tokens = 0

    def __call__(self, x: Tensor) -> None:
        rows = x.flatten(0, 1).double()
        self._first, self._second = self._first + rows.sum(0), self._second + rows.T @ rows
        self._tokens += len(rows)

    def axes(self) -> Axes:
        assert isinstance(self._first, Tensor)
        assert isinstance(self._second, Tensor)
        basis, offset = principal_axes(self._first / self._tokens, self._second / self._tokens)
        return Axes(basis.float(), offset.float())


def _residual(inputs: MergeInputs, task: str, key: str, base: Merged) -> Tensor:
    """What the base misses of an expert's matrix."""
    delta = inputs.delta(task, key)
    return delta.sub_(base.update[key].to(delta.device)) if key in base.update else delta
