"""Model soup: the average of the experts."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mergekit_vision.merger import Former, Merged, MergeInputs, Merger, Revisable, revised_mean


@dataclass(frozen=True)
class Average(Merger):
    """Mean of the experts' weights.

    ``W = W_0 + mean_t τ_t``.

    Source: Wortsman et al., "Model soups" (ICML 2022). No hyper-parameter; scaling coefficient 1.
    """

    title: ClassVar[str] = "Weight averaging"
    paper: ClassVar[str] = "Wortsman et al., Model soups, ICML 2022, arXiv:2203.05482"

    def merge(self, inputs: MergeInputs) -> Merged:
        """Average every parameter."""
        return Merged(inputs.spread(lambda key: inputs.deltas(key).mean(0), inputs.base, "merging"))

    @property
    def revisable(self) -> Revisable:
        """By the mean itself."""
        return "model"

    def revise(self, former: Former, joining: MergeInputs, leaving: MergeInputs) -> Merged:
        """Take experts into the mean, and out of it."""

        def revised(key: str) -> Tensor:
            return revised_mean(former.update(key), key, former, joining, leaving)

        return Merged(joining.spread(revised, joining.base, "merging"))
