"""TSV-M merging."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.functional.linalg import TopSVD, top_svd, top_svd_of_product
from mergekit_vision.functional.threads import in_threads
from mergekit_vision.functional.tsvm import tsvm_merge_of
from mergekit_vision.merger import Factors, Merged, MergeInputs, Merger, check_options

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
            return self._spectral(inputs, key) if key in spectral else inputs.deltas(key).mean(0)

        update = inputs.spread_changed(merged, inputs.base, "merging")
        return Merged(update, fixed=frozenset() if self.scale_average else frozenset(update) - spectral)

    def _spectral(self, inputs: MergeInputs, key: str) -> Tensor:
        """One matrix, by the factors of the task vectors where they are known."""
        k = min(inputs.base[key].shape) // len(inputs.tasks) if self.rank is None else self.rank
        changes = [inputs.factors(task, key) or inputs.delta(task, key) for task in inputs.tasks]
        return tsvm_merge_of(in_threads(lambda change: _top(change, k), changes)).float()


def _top(change: Factors | Tensor, k: int) -> TopSVD:
    """Leading singular triplets of a task vector, float64."""
    if isinstance(change, tuple):
        return top_svd_of_product(change[0].double(), change[1].double(), k)
    return top_svd(change.double(), k)
