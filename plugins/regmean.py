"""RegMean and its family."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import ClassVar, Literal

from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.functional.esd import RowGram
from mergekit_vision.functional.regression import Normal, add_up, of_delta, of_inputs, solved, total
from mergekit_vision.functional.streams import Stream
from mergekit_vision.merger import DataNeeds, LinearInfo, Merged, MergeInputs, Merger, Weights, check_options

Gram = Literal["experts", "merged", "delta"]
PostNorm = Literal["mean", "pretrained"]
Normals = dict[str, Normal]


@dataclass(frozen=True)
class RegMean(Merger):
    """Each Linear layer's least squares fit to the outputs of all experts on their inputs; all else is averaged.

    ``W = W_0 + (Σ_t Δ_t G_t) (Σ_t G_t)⁻¹``, without a coefficient; ``G_t`` is the Gram matrix of the layer's inputs on
    task ``t``'s proxies. Source: Jin et al., "Dataless Knowledge Fusion" (ICLR 2023). RegMean++ (2025) is ``gram="merged"``, LOT
    Merging (NeurIPS 2025) is ``shrink=1``, and the Gram matrices of the data-free methods (WUDI, ACE) are ``gram="delta"``.

    Args:
        gram: inputs that count: the "experts"' own (published); those of the expert's block behind the "merged" blocks before
            it, block after block (RegMean++); or none, with ``Δ_tᵀ Δ_t / ‖Δ_t‖²`` in their place ("delta").
        shrink: factor of the off-diagonal entries of each Gram matrix, in [0, 1]. Where their sum is singular nonetheless, the
            smallest change of the weights is taken (pseudo-inverse).
        ridge: multiple of the mean diagonal entry that is added to the diagonal of the sum: it draws to the backbone.
        post_norm: what the last layer normalization gets: the "mean", or it stays "pretrained" (published code of RegMean++).
    """

    title: ClassVar[str] = "RegMean"
    paper: ClassVar[str] = (
        "Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models, ICLR 2023, arXiv:2212.09849"
    )
    needs: ClassVar[DataNeeds] = "proxies"

    gram: Gram = "experts"
    shrink: float = 0.95
    ridge: float = 0.0
    post_norm: PostNorm = "mean"

    def __post_init__(self) -> None:
        check_options(self, gram=Gram, post_norm=PostNorm)
        if not 0 <= self.shrink <= 1:
            raise InputError(f"RegMean: shrink is {self.shrink}, but must be in [0, 1]; 1 keeps the Gram matrices as they are")
        if not 0 <= self.ridge < math.inf:
            raise InputError(f"RegMean: ridge is {self.ridge}, but must be a finite number, 0 or more")

    def merge(self, inputs: MergeInputs) -> Merged:
        """Average what is no Linear layer's weight, then fit the Linear layers, block after block where inputs count."""
        weights = [linear.weight for linear in inputs.linears]
        kept = _post_norm(inputs) if self.post_norm == "pretrained" else set()
        rest = [key for key in inputs.base if key not in weights and key not in kept]
        update = inputs.spread_changed(lambda key: inputs.deltas(key).mean(0), rest, "averages")
        if self.gram == "delta":
            update |= inputs.spread_changed(partial(self._without_inputs, inputs), weights, "merging")
        else:
            self._fit_blocks(inputs, update)
        return Merged(update, fixed=frozenset(update))

    def _without_inputs(self, inputs: MergeInputs, key: str) -> Tensor:
        totals: Normals = {}
        for task in inputs.tasks:
            if (normal := of_delta(inputs.delta(task, key), self.shrink)) is not None:
                add_up(totals, {key: normal})
        return self._solved(totals, key)

    def _solved(self, totals: Normals, key: str) -> Tensor:
        return solved(totals[key], self.ridge).float()

    def _fit_blocks(self, inputs: MergeInputs, update: dict[str, Tensor]) -> None:
        """Add the updates of the Linear layers; each block sees the tokens that the blocks before it let through."""
        merged = {key: value.float().to(inputs.device) for key, value in inputs.base.items()}
        merged.update({key: merged[key] + value for key, value in update.items()})
        own = dict.fromkeys(inputs.tasks, merged) if self.gram == "merged" else inputs.experts
        streams = {task: _stream(inputs, task, own[task]) for task in inputs.tasks}
        for block, group in groupby(inputs.linears, key=lambda linear: linear.block):
            linears, name = list(group), f"block {block + 1}"
            normals = partial(self._normals, inputs, linears, streams)
            totals = total(inputs.tasks, partial(inputs.spread, normals, description=f"{name}, inputs"))
            keys = [linear.weight for linear in linears]
            found = inputs.spread_changed(partial(self._solved, totals), keys, f"{name}, merging")
            merged.update({key: merged[key] + value for key, value in found.items()})
            update |= found

    def _normals(self, inputs: MergeInputs, linears: list[LinearInfo], streams: Mapping[str, Stream], task: str) -> Normals:
        """A task's part in the normal equations of a block's Linear layers."""
        observers, stream, block = {linear.name: RowGram() for linear in linears}, streams[task], linears[0].block
        left = inputs.blocks.block(block, inputs.experts[task], stream.entering(block), observers)
        if self.gram == "experts":
            stream.left(block, left)
        deltas = ((linear, inputs.delta(task, linear.weight)) for linear in linears)
        return {linear.weight: of_inputs(observers.pop(linear.name), delta, self.shrink) for linear, delta in deltas}


def _post_norm(inputs: MergeInputs) -> set[str]:
    """Keys of the normalization behind the last block: what is no matrix there."""
    behind = 1 + max((linear.block for linear in inputs.linears), default=0)
    return {key for key, value in inputs.base.items() if inputs.depths.get(key) == behind and value.dim() == 1}


def _stream(inputs: MergeInputs, task: str, weights: Weights) -> Stream:
    blocks = inputs.blocks
    return Stream(partial(blocks.embed, task, weights), lambda index, tokens: blocks.block(index, weights, tokens, {}))
