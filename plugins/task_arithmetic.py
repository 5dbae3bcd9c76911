"""Task arithmetic: the sum of the task vectors."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mergekit_vision.merger import Former, Merged, MergeInputs, Merger, Revisable, summed


@dataclass(frozen=True)
class TaskArithmetic(Merger):
    """Scaled sum of the task vectors.

    ``W = W_0 + scale * Σ_t τ_t``.

    Source: Ilharco et al., "Editing models with task arithmetic" (ICLR 2023). Scaling coefficient 0.3, the usual one without
    validation data; on such data it is chosen up to 1.
    """

    title: ClassVar[str] = "Task Arithmetic"
    paper: ClassVar[str] = "Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023, arXiv:2212.04089"

    def merge(self, inputs: MergeInputs) -> Merged:
        """Add up the task vectors of every parameter."""
        return summed(inputs)

    @property
    def revisable(self) -> Revisable:
        """By the sum itself."""
        return "model"

    def revise(self, former: Former, joining: MergeInputs, leaving: MergeInputs) -> Merged:
        """Add task vectors to the sum, and subtract them from it."""

        def revised(key: str) -> Tensor:
            return former.update(key) + joining.deltas(key).sum(0) - leaving.deltas(key).sum(0)

        return Merged(joining.spread(revised, joining.base, "merging"), scale=0.3)
