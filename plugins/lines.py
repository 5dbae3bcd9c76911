"""LiNeS: a merged task vector that is scaled block by block, more the deeper the block lies."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.merger import Merged, MergeInputs, Merger, check_options, static_base

Outer = Literal["first", "depth"]


@dataclass(frozen=True)
class LiNeS(Merger):
    """Scale a merged task vector block by block: little near the input, whose features are general, and more with depth.

    Source: Wang et al., "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging" (ICLR 2025). Block
    ``l`` of ``L`` is multiplied by ``alpha + beta * l / (L - 1)``, everything outside of the blocks by ``alpha``. Factors are
    relative to the base at its own scaling coefficient, which stays that of the result and multiplies all of it: with the
    defaults the published model for that coefficient. A search moves the whole line, where the authors' moves its end.

    Args:
        base: merges what is scaled; the sum of the task vectors where ``None``.
        alpha: factor of the first block, 0 or more. ``None`` (published) takes the one at which the merged task vector has the
            sum of magnitudes of the average of the task vectors.
        beta: by how much the last block's factor is larger, 0 or more. Published: 1, the coefficient itself.
        outer: factor of what lies behind the last block, such as ``visual.proj`` and ``visual.ln_post``: "first", that of the
            first block (published, though it is the smallest of all), or by "depth", that of the last block.
    """

    title: ClassVar[str] = "LiNeS"
    paper: ClassVar[str] = (
        "Wang et al., LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging, ICLR 2025, "
        "arXiv:2410.17146"
    )

    base: Merger | None = None
    alpha: float | None = None
    beta: float = 1.0
    outer: Outer = "first"

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha < math.inf:
            raise InputError(f"LiNeS: alpha is {self.alpha}, but must be a finite number, 0 or more, or null for the average's")
        if not 0 <= self.beta < math.inf:
            raise InputError(f"LiNeS: beta is {self.beta}, but must be a finite number, 0 or more")
        check_options(self, outer=Outer)

    def merge(self, inputs: MergeInputs) -> Merged:
        """Merge the base and multiply each parameter's task vector; what the base holds fixed stays fixed."""
        merged = static_base(inputs, self.base)
        alpha = _average_share(inputs, merged) if self.alpha is None else self.alpha
        depths = _depths(inputs, behind=1.0 if self.outer == "depth" else 0.0)
        return replace(merged, update={key: (alpha + self.beta * depths[key]) * value for key, value in merged.update.items()})


def _average_share(inputs: MergeInputs, merged: Merged) -> float:
    """Sum of magnitudes of the average of the task vectors, over that of a merged one at its own coefficient."""
    means = inputs.spread(lambda key: _magnitude(inputs.deltas(key).mean(0)), inputs.base, "norms")
    whole = sum(merged.coefficient(key) * _magnitude(value) for key, value in merged.update.items())
    return sum(means.values()) / whole if whole else 1.0


def _magnitude(value: Tensor) -> float:
    return float(torch.linalg.vector_norm(value, 1, dtype=torch.float64))


def _depths(inputs: MergeInputs, behind: float) -> dict[str, float]:
    """Where each parameter lies: 0 in the first block and before it, 1 in the last one, and ``behind`` after that."""
    blocks = 1 + max((linear.block for linear in inputs.linears), default=0)
    found = {key: inputs.depths.get(key, -1) for key in inputs.base}
    return {key: behind if depth == blocks else max(0, depth) / max(1, blocks - 1) for key, depth in found.items()}
