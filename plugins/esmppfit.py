"""ESM++ whose experts are fitted, block after block, to do in the merged model what each expert does by itself."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mergekit_vision.errors import InputError
from mergekit_vision.fitting import RouterFit, evidence_of, routed
from mergekit_vision.functional.linalg import pad_rank
from mergekit_vision.functional.lowrank import low_rank_fit
from mergekit_vision.functional.routing import Pooling
from mergekit_vision.merger import (
    DataNeeds,
    LinearInfo,
    LinearKind,
    Merged,
    MergeInputs,
    Merger,
    ModelKind,
    Weights,
    linears_of_kind,
    settled,
    static_base,
)

POOLING: tuple[Pooling, ...] = ("mean", "deviation", "first", "covariance")
"""What the router knows of an image's tokens."""

Factors = dict[str, tuple[Tensor, Tensor]]
"""Linear name -> ``up [d_out, r]`` and ``down [r, d_in]`` of one expert."""


@dataclass(frozen=True)
class ESMPPFit(Merger):
    """A merged base plus low-rank experts fitted to the merged model's own activations; one decision an image.

    A merged base has parameters between its experts' everywhere, and its activations drift from theirs. Here each expert's
    low-rank weights make up for that: with what one task's experts have become in the layers before, those of the next layer
    are fitted, by ridge regression of limited rank on the task's proxy images, to the outputs of the task's own expert, and
    where a layer adds to the residual stream, to that expert's stream. An image is routed once, by a linear discriminant of the
    merged base's activations, in a run ahead. Without training and labels, and for each image on its own.

    Args:
        base: merges the base; ESM with its defaults where ``None``.
        rank: of the experts. 18 in four kinds of layers take as many bytes as 32 in ``in_proj`` and ``c_fc``.
        layers: which Linear layers of each block are routed.
        ridge: pull towards the residual, the expert's weight less the base's, as a multiple of the mean square of the layer's
            inputs; above 0.
        patches: weight of all tokens but the first in the last block, except in ``in_proj``; 1 where the encoder pools over all.
        top_k: experts an image mixes, weighted by their calibrated posteriors.
    """

    title: ClassVar[str] = "ESM++ with fitted experts"
    needs: ClassVar[DataNeeds] = "proxies"
    kind: ClassVar[ModelKind] = "dynamic"

    base: Merger | None = None
    rank: int = 18
    layers: tuple[LinearKind, ...] = ("in_proj", "out_proj", "c_fc", "c_proj")
    ridge: float = 0.3
    patches: float = 0.1
    top_k: int = 2

    def __post_init__(self) -> None:
        for name in ("rank", "top_k"):
            if getattr(self, name) < 1:
                raise InputError(f"ESMPPFit: {name} is {getattr(self, name)}, but must be at least 1")
        if not 0 < self.ridge < 1e6:
            raise InputError(f"ESMPPFit: ridge is {self.ridge}, but must be above 0 and below 1e6")
        if not 0 <= self.patches <= 1:
            raise InputError(f"ESMPPFit: patches is {self.patches}, but must be in [0, 1]")

    def merge(self, inputs: MergeInputs) -> Merged:
        """Merge the base, fit the router and, task by task, the experts."""
        from .esm import ESM  # here, as only the default depends on another plugin

        linears = linears_of_kind(inputs.linears, self.layers)
        base = settled(inputs, static_base(inputs, ESM() if self.base is None else self.base))
        found = inputs.spread(partial(self._expert, inputs, base, linears), inputs.tasks, "experts").values()
        factors = {linear.name: _stacked([expert[linear.name] for expert in found]) for linear in linears}
        fit = RouterFit("ESMPPFit", "discriminant", POOLING, top_k=self.top_k, temperature=None)
        held = _deciding(inputs, linears)
        names = [linears[held].name]
        axes = fit.axes(inputs, names, base)
        routers = fit.of_features(fit.features(inputs, names, base, axes), axes)
        return replace(base, routed=routed(factors, routers, evidence_of("ESMPPFit", "once", held, linears)))

    def _expert(self, inputs: MergeInputs, base: Merged, linears: list[LinearInfo], task: str) -> Factors:
        """A task's low-rank weights; each layer sees those of the layers before it."""
        run, last, found = inputs.blocks.block, inputs.linears[-1].block, Factors()
        own, weights = dict[str, Tensor](), dict[str, Tensor]()
        for key, value in inputs.base.items():
            own[key] = (delta := inputs.delta(task, key)).add_(value.to(delta))
            weights[key] = value.to(delta) + base.update[key].to(delta) if key in base.update else value.to(delta)
        theirs, ours = inputs.blocks.embed(task, own), inputs.blocks.embed(task, weights)
        for block in range(last + 1):
            layers = {linear.name: linear for linear in linears if linear.block == block}
            seen = {name: Inputs() for name in layers}
            behind = run(block, own, theirs, seen)
            for name, linear in layers.items():
                at, key = Inputs(), linear.weight
                after = run(block, weights, ours, {name: at})
                target = _outputs(linear, seen[name].all, own) - _outputs(linear, at.all, weights)
                if linear.kind == "out_proj":
                    target += theirs - ours
                elif linear.kind == "c_proj":
                    target = (behind - after).double()
                found[name] = target.new_zeros(len(own[key]), 0).float(), target.new_zeros(0, own[key].shape[1]).float()
                if any(inputs.changed(other, key) for other in inputs.tasks):
                    patches = self.patches if block == last and linear.kind != "in_proj" else 1.0
                    rows, target = (_weighted(part, patches) for part in (at.all, target))
                    found[name] = low_rank_fit(rows, target, own[key] - weights[key], self.rank, self.ridge)
                    weights[key] = weights[key] + found[name][0] @ found[name][1]
            theirs, ours = behind, run(block, weights, ours, {})
        return found


class Inputs:
    """Observer that keeps a layer's inputs."""

    def __init__(self) -> None:
        self._batches: list[Tensor] = []

    def __call__(self, x: Tensor) -> None:
        """Keep inputs of some images, ``[images, tokens, d_in]``."""
        self._batches.append(x.detach())

    @property
    def all(self) -> Tensor:
        """Those of all images, ``[images, tokens, d_in]``, float64."""
        return torch.cat(self._batches).double()


def _outputs(linear: LinearInfo, x: Tensor, weights: Weights) -> Tensor:
    """What a layer makes of its inputs, float64."""
    return F.linear(x, weights[linear.weight].double(), None if linear.bias is None else weights[linear.bias].double())


def _weighted(x: Tensor, patches: float) -> Tensor:
    """Tokens ``[images, tokens, d]`` as rows, all but the first of an image times the root of their weight."""
    return torch.cat([x[:, :1], patches**0.5 * x[:, 1:]], 1).flatten(0, 1)


def _stacked(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The factors of all experts, ``[T, d_out, r]`` and ``[T, r, d_in]``, with the largest rank that one has; at least 1."""
    rank = max(1, *(len(down) for _, down in parts))
    return torch.stack([pad_rank(up, rank, 1) for up, _ in parts]), torch.stack([pad_rank(down, rank, 0) for _, down in parts])


def _deciding(inputs: MergeInputs, linears: Sequence[LinearInfo]) -> int:
    """Index of the layer that decides: the last of those with the fewest inputs, so that its router is small."""
    widths = [inputs.base[linear.weight].shape[1] for linear in linears]
    return len(widths) - 1 - widths[::-1].index(min(widths))
