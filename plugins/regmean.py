"""RegMean and its family."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import ClassVar, Literal

from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.functional.esd import RowGram
from mergekit_vision.functional.gram import symmetric, triangle
from mergekit_vision.functional.regression import NULL, Normal, of_delta, of_inputs, solved
from mergekit_vision.functional.streams import Stream, Updated
from mergekit_vision.merger import (
    DataNeeds,
    Former,
    LinearInfo,
    Merged,
    MergeInputs,
    Merger,
    Revisable,
    Weights,
    add_up,
    check_options,
    revised_mean,
)

Gram = Literal["experts", "merged", "delta"]
PostNorm = Literal["mean", "pretrained"]
Normals = dict[str, Normal]
Find = Callable[[str], Normal | None]
Fitted = tuple[Tensor, dict[str, Tensor]] | None


@dataclass(frozen=True)
class RegMean(Merger):
    """Each Linear layer's least squares fit to the outputs of all experts on their inputs; all else is averaged.

    ``W = W_0 + (Σ_t Δ_t G_t) (Σ_t G_t)⁻¹``, without a coefficient; ``G_t`` is the Gram matrix of the layer's inputs on
    task ``t``'s proxies. Source: Jin et al., "Dataless Knowledge Fusion" (ICLR 2023). RegMean++ (2025) is ``gram="merged"``, the
    least squares of LOT Merging (NeurIPS 2025) are ``shrink=1``, and the Gram matrices of the data-free methods (WUDI, ACE) are
    ``gram="delta"`` with ``shrink=1``.

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

    @property
    def data_needs(self) -> DataNeeds:
        """None where no inputs count."""
        return "none" if self.gram == "delta" else "proxies"

    def merge(self, inputs: MergeInputs) -> Merged:
        """Average what is no Linear layer's weight, then fit the Linear layers, block after block where inputs count."""
        update = inputs.spread_changed(lambda key: inputs.deltas(key).mean(0), self._averaged(inputs), "averages")
        if self.gram == "delta":
            weights, kept = [linear.weight for linear in inputs.linears], dict[str, Tensor]()
            normals = partial(_of_deltas, inputs, self.shrink)
            found = inputs.spread_changed(lambda key: self._fitted(normals(key), inputs.keep is not None), weights, "merging")
            _sort(found, update, kept)
        else:
            kept = self._fit_blocks(inputs, update)
        return Merged(update, fixed=frozenset(update), kept=kept)

    @property
    def revisable(self) -> Revisable:
        """By the normal equations; not where these depend on the merged model."""
        return "no" if self.gram == "merged" else "state"

    def revise(self, former: Former, joining: MergeInputs, leaving: MergeInputs) -> Merged:
        """Add to the normal equations, and subtract from them."""

        def mean(key: str) -> Tensor:
            return revised_mean(former.change[key], key, former, joining, leaving)

        update, kept = joining.spread(mean, self._averaged(joining), "averages"), dict[str, Tensor]()
        for name, keys, more, less in self._changes(joining, leaving):

            def fitted(key: str, more: Find = more, less: Find = less) -> Fitted:
                return self._fitted(_revised(_former(former, key), more(key), less(key)), True)

            _sort(joining.spread(fitted, keys, name), update, kept)
        return Merged(update, fixed=frozenset(update), kept=kept)

    def _averaged(self, inputs: MergeInputs) -> list[str]:
        """Keys of the parameters that are averaged."""
        apart = {linear.weight for linear in inputs.linears} | (_post_norm(inputs) if self.post_norm == "pretrained" else set())
        return [key for key in inputs.base if key not in apart]

    def _changes(self, joining: MergeInputs, leaving: MergeInputs) -> Iterator[tuple[str, list[str], Find, Find]]:
        """Layers, and what is added to and subtracted from their normal equations, with a description."""
        if self.gram == "delta":
            keys = [linear.weight for linear in joining.linears]
            yield "merging", keys, partial(_of_deltas, joining, self.shrink), partial(_of_deltas, leaving, self.shrink)
        else:
            blocks = (self._blocks(inputs, _own_streams(inputs)) for inputs in (joining, leaving))
            for (name, keys, more), (_, _, less) in zip(*blocks, strict=True):
                yield f"{name}, merging", keys, more.get, less.get

    def _fitted(self, normal: Normal | None, keeping: bool) -> Fitted:
        """The solution of normal equations, if there are any, and what is kept of them."""
        if normal is None:
            return None
        return solved(normal, self.ridge).float(), _packed(normal) if keeping else {}

    def _fit_blocks(self, inputs: MergeInputs, update: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the updates of the Linear layers; each block sees the tokens that the blocks before it let through."""
        streams = _own_streams(inputs)
        if self.gram == "merged":
            merged = Updated(inputs.base, update)
            streams = {task: _stream(inputs, task, merged) for task in inputs.tasks}
        kept: dict[str, Tensor] = {}
        for name, keys, totals in self._blocks(inputs, streams):
            solve = partial(_solved, totals, self.ridge)
            found = inputs.spread_changed(solve, keys, f"{name}, merging")
            update |= found
            if inputs.keep is not None:  # of unchanged layers too: an expert that joins may have changed them
                kept |= {f"{key}/{part}": tensor for key in keys for part, tensor in _packed(totals[key]).items()}
        return kept

    def _blocks(self, inputs: MergeInputs, streams: Mapping[str, Stream]) -> Iterator[tuple[str, list[str], Normals]]:
        """Name, layers and normal equations of each block, by the inputs of its layers."""
        for block, group in groupby(inputs.linears, key=lambda linear: linear.block):
            linears, name = list(group), f"block {block + 1}"
            normals = partial(self._normals, inputs, linears, streams)
            totals = inputs.spread_sum(normals, inputs.tasks, f"{name}, inputs")
            yield name, [linear.weight for linear in linears], totals
            totals.clear()  # before the next block's

    def _normals(self, inputs: MergeInputs, linears: list[LinearInfo], streams: Mapping[str, Stream], task: str) -> Normals:
        """A task's part in the normal equations of a block's Linear layers."""
        observers, stream, block = {linear.name: RowGram() for linear in linears}, streams[task], linears[0].block
        left = inputs.blocks.block(block, inputs.experts[task], stream.entering(block), observers)
        if self.gram == "experts":
            stream.left(block, left)
        deltas = ((linear, inputs.delta(task, linear.weight)) for linear in linears)
        return {linear.weight: of_inputs(observers.pop(linear.name), delta, self.shrink) for linear, delta in deltas}


def _of_deltas(inputs: MergeInputs, shrink: float, key: str) -> Normal | None:
    """Normal equations of one layer without inputs; ``None`` where no expert changed it."""
    totals: Normals = {}
    for task in inputs.tasks:
        if (normal := of_delta(inputs.delta(task, key), shrink)) is not None:
            add_up(totals, {key: normal})
    return totals.get(key)


def _solved(totals: Normals, ridge: float, key: str) -> Tensor:
    return solved(totals[key], ridge).float()


def _post_norm(inputs: MergeInputs) -> set[str]:
    """Keys of the normalization behind the last block: what is no matrix there."""
    behind = 1 + max((linear.block for linear in inputs.linears), default=0)
    return {key for key, value in inputs.base.items() if inputs.depths.get(key) == behind and value.dim() == 1}


def _stream(inputs: MergeInputs, task: str, weights: Weights) -> Stream:
    blocks = inputs.blocks
    return Stream(partial(blocks.embed, task, weights), lambda index, tokens: blocks.block(index, weights, tokens, {}))


def _own_streams(inputs: MergeInputs) -> dict[str, Stream]:
    """Each task's proxy images in its own expert."""
    return {task: _stream(inputs, task, inputs.experts[task]) for task in inputs.tasks}


def _sort(found: Mapping[str, Fitted], update: dict[str, Tensor], kept: dict[str, Tensor]) -> None:
    """Put solutions into the update, and what is kept to the rest of it."""
    for key, fitted in found.items():
        if fitted is not None:
            update[key] = fitted[0]
            kept |= {f"{key}/{part}": tensor for part, tensor in fitted[1].items()}


def _packed(normal: Normal) -> dict[str, Tensor]:
    return {"matrix": triangle(normal.matrix), "target": normal.target}


def _former(former: Former, key: str) -> Normal | None:
    """The normal equations of a layer that were kept; ``None`` where nothing was."""
    matrix, target = (former.kept.get(f"{key}/{part}") for part in Normal._fields)
    if matrix is None or target is None:
        return None
    d_out, d_in = former.change[key].shape
    if tuple(target.shape) != (d_in, d_out) or tuple(matrix.shape) != (d_in * (d_in + 1) // 2,):
        raise InputError(f"what was kept does not fit the model: {key}; merge again")
    return Normal(symmetric(matrix, d_in), target)


def _revised(former: Normal | None, more: Normal | None, less: Normal | None) -> Normal | None:
    """The sum of normal equations without some; nothing where all that is left of them is rounding."""
    found = [normal for normal in (former, more) if normal is not None]
    if not found:
        return None
    whole = Normal(*(sum(parts[1:], parts[0]) for parts in zip(*found, strict=True)))
    if less is None:
        return whole
    rest = Normal(whole.matrix - less.matrix, whole.target - less.target)
    return rest if rest.matrix.norm() > NULL * whole.matrix.norm() else None
