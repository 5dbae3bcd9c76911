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
from mergekit_vision.functional.gram import gram
from mergekit_vision.functional.linalg import pad_rank
from mergekit_vision.functional.lowrank import low_rank_fit
from mergekit_vision.functional.routing import Pooling
from mergekit_vision.functional.streams import Remembered, Updated, in_steps
from mergekit_vision.merger import (
    DataNeeds,
    LinearInfo,
    LinearKind,
    Merged,
    MergeInputs,
    Merger,
    ModelKind,
    Weights,
    check_kinds,
    check_whole,
    linears_of_kind,
    settled,
    static_base,
)

POOLING: tuple[Pooling, ...] = ("mean", "deviation", "first", "covariance")
"""What the router knows of an image's tokens."""

ExpertFactors = dict[str, tuple[Tensor, Tensor]]
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
        check_whole(self, 1, "rank", "top_k")
        check_kinds(self, self.layers)
        if not 0 < self.ridge < 1e6:
            raise InputError(f"ESMPPFit: ridge is {self.ridge}, but must be above 0 and below 1e6")
        if not 0 <= self.patches <= 1:
            raise InputError(f"ESMPPFit: patches is {self.patches}, but must be in [0, 1]")

    def merge(self, inputs: MergeInputs) -> Merged:
        """Merge the base, fit the router and, task by task, the experts."""
        from .esm import ESM  # here, as only the default depends on another plugin

        if any(key.endswith((".ls_1.gamma", ".ls_2.gamma")) for key in inputs.base):
            raise InputError(
                "ESMPPFit: this encoder scales what its layers add to the residual stream (LayerScale), which the fit does not "
                "know of; take ESMPPBayes"
            )
        linears = linears_of_kind(inputs.linears, self.layers)
        base = settled(inputs, static_base(inputs, ESM() if self.base is None else self.base))
        changed = inputs.spread_changed(lambda key: True, [linear.weight for linear in linears], "layers that changed")
        expert = partial(self._expert, inputs, base, [linear for linear in linears if linear.weight in changed])
        found = inputs.spread(expert, inputs.tasks, "experts").values()
        factors = {linear.name: _stacked(inputs, linear, [expert.get(linear.name) for expert in found]) for linear in linears}
        fit = RouterFit("ESMPPFit", "discriminant", POOLING, top_k=self.top_k, temperature=None)
        held = _held_layer(inputs, linears)
        names = [linears[held].name]
        axes = fit.axes(inputs, names, base)
        routers = fit.of_features(fit.features(inputs, names, base, axes), axes)
        return replace(base, routed=routed(factors, routers, evidence_of("ESMPPFit", "once", held, linears)))

    def _expert(self, inputs: MergeInputs, base: Merged, linears: list[LinearInfo], task: str) -> ExpertFactors:
        """A task's low-rank weights; each layer sees those of the layers before it."""
        run, found, fitted = inputs.blocks.block, ExpertFactors(), dict[str, Tensor]()
        own, weights = inputs.experts[task], Updated(Updated(inputs.base, base.update), fitted)
        theirs, ours = inputs.blocks.embed(task, own), inputs.blocks.embed(task, weights)
        last = linears[-1].block if linears else -1
        for block in range(last + 1):
            layers, here = [linear for linear in linears if linear.block == block], Remembered(own)
            seen = {linear.name: _KeptInputs() for linear in layers if linear.kind != "c_proj"}
            behind = run(block, here, theirs, seen)
            for linear in layers:
                x = seen.pop(linear.name).all if linear.name in seen else behind
                moments = self._moments(inputs, linear, (here, Remembered(weights)), (theirs, behind, x), ours)
                residual = inputs.delta(task, linear.weight)
                if linear.weight in base.update:
                    residual -= base.update[linear.weight].to(residual)
                found[linear.name] = up, down = low_rank_fit(*moments, residual, self.rank, self.ridge)
                fitted[linear.weight] = up @ down
            if block < last:
                theirs, ours = behind, run(block, weights, ours, {})
            fitted.clear()  # a block's weights are large, and no other one's concern
        return found

    def _moments(
        self, inputs: MergeInputs, linear: LinearInfo, models: tuple[Weights, Weights], theirs: Sequence[Tensor], ours: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``XᵀX`` and ``XᵀY`` of a layer's inputs ``x`` in the merged model and of what is missing there, ``y``; float64.

        Args:
            inputs: where blocks are run.
            linear: the layer.
            models: the expert's weights and the merged model's.
            theirs: the expert's streams before and behind the layer's block, and its inputs of the layer.
            ours: the merged model's streams before the block.
        """
        patches = self.patches if linear.block == inputs.linears[-1].block and linear.kind != "in_proj" else 1.0
        d_out, d_in = inputs.base[linear.weight].shape
        own, weights = models
        G, cross = (ours.new_zeros(d_in, d, dtype=torch.float64) for d in (d_in, d_out))
        for before, *their in in_steps(ours, *theirs):
            seen = _KeptInputs()
            behind = inputs.blocks.block(linear.block, weights, before, {linear.name: seen})
            x = seen.all.double()
            missing = _reached(linear, own, *their) - _reached(linear, weights, before, behind, x)
            rows, missing = (_weighted(part, patches) for part in (x, missing))
            gram(rows, G)
            cross.addmm_(rows.T, missing)
        return G, cross


class _KeptInputs:
    """Observer that keeps a layer's inputs."""

    def __init__(self) -> None:
        self._batches: list[Tensor] = []

    def __call__(self, x: Tensor) -> None:
        """Keep inputs of some images, ``[images, tokens, d_in]``."""
        self._batches.append(x.detach())

    @property
    def all(self) -> Tensor:
        """Those of all images, ``[images, tokens, d_in]``."""
        return torch.cat(self._batches)


def _reached(linear: LinearInfo, weights: Weights, before: Tensor, behind: Tensor, x: Tensor) -> Tensor:
    """What a layer makes of its inputs ``x``, float64: its outputs, or where it adds to the residual stream, that stream.

    ``before`` and ``behind`` are the stream before and behind its block; ``c_proj`` needs ``behind`` alone.
    """
    if linear.kind == "c_proj":
        return behind.double()

    def exact(key: str) -> Tensor:
        return weights[key].to(x.device).double()  # moved first: an expert may lie on a device without float64

    out = F.linear(x.double(), exact(linear.weight), None if linear.bias is None else exact(linear.bias))
    return out.add_(before) if linear.kind == "out_proj" else out


def _weighted(x: Tensor, patches: float) -> Tensor:
    """Tokens ``[images, tokens, d]`` as rows, all but the first of an image times the root of their weight."""
    return torch.cat([x[:, :1], patches**0.5 * x[:, 1:]], 1).flatten(0, 1)


def _stacked(inputs: MergeInputs, linear: LinearInfo, parts: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor]:
    """The factors of all experts, ``[T, d_out, r]`` and ``[T, r, d_in]``, with the largest rank that one has; at least 1.

    Those of a layer that no expert changed are 0.
    """
    zero = torch.zeros(inputs.base[linear.weight].shape, device=inputs.device)
    pairs = [(zero[:, :0], zero[:0]) if part is None else part for part in parts]
    rank = max(1, *(len(down) for _, down in pairs))
    return torch.stack([pad_rank(up, rank, 1) for up, _ in pairs]), torch.stack([pad_rank(down, rank, 0) for _, down in pairs])


def _held_layer(inputs: MergeInputs, linears: Sequence[LinearInfo]) -> int:
    """Index of the layer that decides: the last of those with the fewest inputs, so that its router is small."""
    widths = [inputs.base[linear.weight].shape[1] for linear in linears]
    return len(widths) - 1 - widths[::-1].index(min(widths))
