"""TSV-M merging."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.functional.tsvm import tsvm_merge
from mergekit_vision.merger import Merged, MergeInputs, Merger, check_options

Other = Literal["tsvm", "mean"]


@dataclass(frozen=True)
class TSVM(Merger):
    """Task singular vectors: truncated SVDs of the task vectors, orthogonalized against each other.

    Source: Gargiulo et al., "Task Singular Vectors" (CVPR 2025), TSV-Merge. Parameters that are no matrices are averaged. The
    scaling coefficient is 1 by default.

    Args:
        rank: singular triplets a task keeps, at most the numerical rank. Published, and the default: ``min(d_out, d_in) // T``.
        other: how the matrices outside of the blocks, ``visual.proj`` and ``visual.positional_embedding``, are merged: "tsvm"
            like the rest (published) or "mean".
        scale_average: whether the scaling coefficient multiplies the averaged parameters too (published), or they are added as
            they are: a coefficient above 1 over-drives normalizations and biases.
    """

    title: ClassVar[str] = "TSV-Merge"
    paper: ClassVar[str] = (
        "Gargiulo et al., Task Singular Vectors: Reducing Task Interference in Model Merging, CVPR 2025, arXiv:2412.00081"
    )

    rank: int | None = None
    other: Other = "tsvm"
    scale_average: bool = True

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise InputError(f"TSVM: rank is {self.rank}, but must be at least 1, or null for min(d_out, d_in) // T")
        check_options(self, other=Other)

    def merge(self, inputs: MergeInputs) -> Merged:
        """Merge parameter by parameter; one that no expert changed keeps its pre-trained value."""
        spectral = inputs.matrices(everywhere=self.other == "tsvm")

        def merged(key: str) -> Tensor:
            deltas = inputs.deltas(key)
            return tsvm_merge(deltas, self.rank) if key in spectral else deltas.mean(0)

        update = inputs.spread_changed(merged, inputs.base, "merging")
        return Merged(update, fixed=frozenset() if self.scale_average else frozenset(update) - spectral)
