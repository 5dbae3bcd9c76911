"""FeatCal: calibration of a merged model on proxy images."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.functional.featcal import LinearFit, NormFit, NormInputs, PairedInputs
from mergekit_vision.functional.streams import Stream, Updated, in_steps
from mergekit_vision.merger import DataNeeds, LinearInfo, Merged, MergeInputs, Merger, NormInfo, Weights, settled, static_base

Layers = Mapping[str, LinearInfo | NormInfo]
Fits = Mapping[str, LinearFit | NormFit]


@dataclass(frozen=True)
class FeatCal(Merger):
    """Calibrates a merged model block after block on proxy images, so that its layers do what the experts' would.

    Source: "FeatCal" (2026, arXiv 2605.13030), in the form of the authors' code. Each layer of the blocks is fitted by ridge
    regression, at the calibrated model's own inputs ``x``, to the expert's outputs at ``x + alpha (x' - x)`` with ``x'`` its own,
    and drawn to an anchor; one whose weight no expert changed stays as it is, with its bias, where the authors' code fits it too.
    No coefficient scales the result; the base is taken at the one that is set or searched.

    Args:
        base: merges what is calibrated; the sum of the task vectors where ``None``.
        alpha: share of the expert's own inputs, in [0, 1]. Published: 0.25.
        rho: the anchor is the backbone plus ``rho`` times the base's update. ``None`` takes 2.2 where ``base`` is
            ``None`` too (published, at coefficient 0.3), and 1 where a base is named, also where that is task arithmetic.
        ridge: pull of the anchor, relative to a task's Gram matrix of norm 1. Published: 0.05, for task arithmetic, eight tasks
            and 256 images. On a strong base, such as ESM, take 1.
        patches: weight of all tokens but the first in the last block, except for keys and values; 1 where the encoder pools over
            all tokens. Published: 0.01.
        norms: whether layer normalizations are calibrated too (published).
    """

    title: ClassVar[str] = "FeatCal"
    paper: ClassVar[str] = "FeatCal, 2026, arXiv:2605.13030"
    needs: ClassVar[DataNeeds] = "proxies"

    base: Merger | None = None
    alpha: float = 0.25
    rho: float | None = None
    ridge: float = 0.05
    patches: float = 0.01
    norms: bool = True

    def __post_init__(self) -> None:
        for name, most in (("alpha", 1.0), ("patches", 1.0), ("rho", math.inf), ("ridge", math.inf)):
            if (value := getattr(self, name)) is not None and not (0 <= value <= most and value < math.inf):
                limits = "in [0, 1]" if most == 1 else "a finite number, 0 or more"
                raise InputError(f"FeatCal: {name} is {value}, but must be {limits}")

    def merge(self, inputs: MergeInputs) -> Merged:
        """Merge the base, then calibrate its blocks in order; the tokens of each come from the calibrated ones before it."""
        run = inputs.blocks

        def stream(task: str, weights: Weights) -> Stream:
            return Stream(partial(run.embed, task, weights), lambda index, tokens: run.block(index, weights, tokens, {}))

        base = settled(inputs, static_base(inputs, self.base))
        update = dict(base.update)
        weights, scale = Updated(inputs.base, update), base.scale
        del base  # what is calibrated takes the place of what the base had
        streams = {task: (stream(task, weights), stream(task, inputs.experts[task])) for task in inputs.tasks}
        for block in range(inputs.linears[-1].block + 1):
            layers: dict[str, LinearInfo | NormInfo] = {at.weight: at for at in inputs.linears if at.block == block}
            layers |= {norm.weight: norm for norm in inputs.norms if norm.block == block and self.norms}
            fit = partial(self._fit, inputs, weights, streams, layers)
            fits = inputs.spread_sum(fit, inputs.tasks, f"block {block + 1}, inputs")
            calibrate = partial(self._calibrate, inputs, update, layers, fits)
            for found in inputs.spread(calibrate, layers, f"block {block + 1}, calibration").values():
                update |= found
            fits.clear()  # before the next block's
        return Merged(update, scale, fixed=frozenset(update))

    def _fit(
        self, inputs: MergeInputs, weights: Weights, streams: Mapping[str, tuple[Stream, Stream]], layers: Layers, task: str
    ) -> Fits:
        """A task's part in the fits of the layers of a block."""
        moments = {layer: self._moments(inputs, task, layer) for layer in layers.values()}
        seen = {layer.name: moment.merged for layer, moment in moments.items()}
        paired = {layer.name: moment.expert for layer, moment in moments.items() if isinstance(moment, PairedInputs)}
        block, (merged, expert) = next(iter(moments)).block, streams[task]
        ours, theirs = merged.entering(block), expert.entering(block)
        for own, other in in_steps(ours, theirs):
            inputs.blocks.block(block, weights, own, seen)
            other.copy_(inputs.blocks.block(block, inputs.experts[task], other, paired))
        expert.left(block, theirs)
        del seen, paired  # which hold moments that are no longer needed
        biases = {key: None if layer.bias is None else inputs.delta(task, layer.bias) for key, layer in layers.items()}
        return {key: moments.pop(layer).fit(biases[key]) for key, layer in layers.items()}

    def _moments(self, inputs: MergeInputs, task: str, layer: LinearInfo | NormInfo) -> PairedInputs | NormInputs:
        """Sums over a layer's inputs. Behind the last block only an image's first token is used; attention sees them all."""
        patches = self.patches if layer.block == inputs.linears[-1].block else 1.0
        delta = inputs.delta(task, layer.weight)
        if isinstance(layer, NormInfo):
            return NormInputs(delta, patches)
        groups = (patches, 1.0, 1.0) if layer.kind == "in_proj" and patches < 1 else (patches,)
        return PairedInputs(inputs.base[layer.weight], delta, self.alpha, groups)

    def _calibrate(self, inputs: MergeInputs, update: Weights, layers: Layers, fits: Fits, key: str) -> dict[str, Tensor]:
        """Updates of a layer's weight and bias; what no expert changed stays as it is."""
        rho = self.rho if self.rho is not None else 2.2 if self.base is None else 1.0
        parameters = (layers[key].weight, layers[key].bias)
        keys = [k for k in parameters if k is not None and inputs.any_changed(k)]
        if key not in keys:
            return {}
        anchor = [rho * update[k] if k in update else inputs.delta(inputs.tasks[0], k).zero_() for k in keys]
        found = fits[key].calibrate(anchor[0], anchor[1] if len(anchor) == 2 else None, self.ridge)
        return {k: value.float() for k, value in zip(keys, found, strict=False) if value is not None}
