"""TSV-M merging."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mergekit_vision.functional.linalg import TopSVD, top_svd, top_svd_of_product
from mergekit_vision.merger import Factors, Merged, MergeInputs, check_options, check_rank
from mergekit_vision.parts import ByParts, Finder, Part, merged_triplets, shared_out

Other = Literal["tsvm", "mean"]


@dataclass(frozen=True)
class TSVM(ByParts):
    """Task singular vectors: truncated SVDs of the task vectors, orthogonalized against each other.

    Source: Gargiulo et al., "Task Singular Vectors" (CVPR 2025), TSV-Merge. Parameters that are no matrices are averaged. The
    scaling coefficient is 1 by default.

    Args:
        rank: singular triplets a task keeps, at most the numerical rank. Published, and the default: ``min(d_out, d_in) // T``.
            With "energy" the tasks share out so many for each of them: the triplets of all are taken in the order of their share
            of the task vector's squared singular values.
        floor: least share of the default rank that "energy" leaves a task, in [0, 1].
        other: how the matrices outside of the blocks, ``visual.proj`` and ``visual.positional_embedding``, are merged: "tsvm"
            like the rest (published) or "mean".
        scale_average: whether the scaling coefficient multiplies the averaged parameters too (published), or they are added as
            they are: a coefficient above 1 over-drives normalizations and biases.
    """

    title: ClassVar[str] = "TSV-Merge"
    paper: ClassVar[str] = (
        "Gargiulo et al., Task Singular Vectors: Reducing Task Interference in Model Merging, CVPR 2025, arXiv:2412.00081"
    )

    rank: int | Literal["energy"] | None = None
    other: Other = "tsvm"
    scale_average: bool = True
    floor: float = 0.25

    def __post_init__(self) -> None:
        check_rank(self, "null for min(d_out, d_in) // T, or energy", self.rank, self.floor)
        check_options(self, other=Other)

    def directions_of(self, inputs: MergeInputs, key: str, tasks: int) -> int | None:
        """Singular triplets a task of a matrix; by energy, all are looked at."""
        if key not in inputs.matrices(everywhere=self.other == "tsvm"):
            return None
        if isinstance(self.rank, int):
            return self.rank
        return min(inputs.base[key].shape) // (tasks if self.rank is None else 1)

    def change_of(self, inputs: MergeInputs, task: str, key: str) -> Factors | Tensor:
        """The factors of a task vector where they are known, which say more of it than their product does."""
        return inputs.factors(task, key) or inputs.delta(task, key)

    def finder(self, inputs: MergeInputs, tasks: int) -> Finder:
        """The truncated SVD, float64."""
        return lambda task, key, change, count: Part.of_triplets(_top(change, count))

    def combined(self, inputs: MergeInputs, key: str, parts: Sequence[Part]) -> Tensor:
        """Make the singular vectors of all tasks orthogonal."""
        if self.rank == "energy":
            energies = [part.weights.square() for part in parts]
            parts = shared_out(parts, energies, min(inputs.base[key].shape) // len(parts), self.floor)
        return merged_triplets(parts)

    def finished(self, inputs: MergeInputs, update: dict[str, Tensor]) -> Merged:
        """The model, in which the averages may be fixed."""
        spectral = inputs.matrices(everywhere=self.other == "tsvm")
        return Merged(update, fixed=frozenset() if self.scale_average else frozenset(update) - spectral)


def _top(change: Factors | Tensor, k: int) -> TopSVD:
    """Leading singular triplets of a task vector, float64."""
    if isinstance(change, tuple):
        return top_svd_of_product(change[0].double(), change[1].double(), k)
    return top_svd(change.double(), k)
