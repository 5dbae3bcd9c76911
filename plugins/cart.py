"""CART merging."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.functional.linalg import top_svd
from mergekit_vision.functional.threads import in_threads
from mergekit_vision.merger import Merged, MergeInputs, Merger, check_options

Other = Literal["mean", "low_rank"]


@dataclass(frozen=True)
class CART(Merger):
    """Average of the experts plus the low-rank parts in which each differs from it.

    ``W = W̄ + gain * Σ_t SVD_k(W_t - W̄)`` with the average ``W̄`` and ``k = max(1, floor(share * min(d_out, d_in)))``, for the
    matrices of the blocks; all other parameters are averaged.

    Source: Choi et al., "Revisiting Weight Averaging for Model Merging" (2024), CART. A scaling coefficient would multiply the
    average too, whereas published is a factor of the second term alone. So all keys are fixed: the scaling coefficient has no
    effect, is not searched, and :attr:`gain` takes its place. Two experts differ from their average by opposites, which add up to
    nothing: merged is the average, whatever the parameters.

    Args:
        gain: factor of the low-rank parts. The authors choose it on validation data. The default is where their later code,
            AdaRank, starts for eight ViT-B/32 experts.
        share: rank of those parts, as a share of the full one, in (0, 1]. Published: 0.08; in AdaRank 0.16 for eight experts.
        other: how the matrices outside of the blocks, ``visual.proj`` and ``visual.positional_embedding``, are merged: "mean"
            (published), or "low_rank" like those in the blocks.
    """

    title: ClassVar[str] = "CART"
    paper: ClassVar[str] = "Choi et al., Revisiting Weight Averaging for Model Merging, 2024, arXiv:2412.12153"

    gain: float = 2.3
    share: float = 0.08
    other: Other = "mean"

    def __post_init__(self) -> None:
        if not 0 <= self.gain < math.inf:
            raise InputError(f"CART: gain is {self.gain}, but must be a finite number, 0 or more")
        if not 0 < self.share <= 1:
            raise InputError(f"CART: share is {self.share}, but must be a share of the full rank in (0, 1], such as 0.08")
        check_options(self, other=Other)

    def merge(self, inputs: MergeInputs) -> Merged:
        """Merge parameter by parameter; one that no expert changed keeps its pre-trained value."""
        low_rank = inputs.matrices(everywhere=self.other == "low_rank")

        def merged(key: str) -> Tensor:
            deltas = inputs.deltas(key)
            return self._centered(deltas) if key in low_rank else deltas.mean(0)

        update = inputs.spread_changed(merged, inputs.base, "merging")
        return Merged(update, fixed=frozenset(update))

    def _centered(self, deltas: Tensor) -> Tensor:
        """Merged task vector of one matrix, ``deltas`` ``[T, d_out, d_in]``."""
        mean = deltas.mean(0, dtype=torch.float64)
        k = max(1, int(self.share * min(mean.shape)))
        tops = in_threads(lambda delta: top_svd(delta.double() - mean, k), list(deltas))
        left, right = torch.cat([top.U * top.S for top in tops], 1), torch.cat([top.Vh for top in tops])
        return mean.add_(left @ right, alpha=self.gain).to(deltas.dtype)
