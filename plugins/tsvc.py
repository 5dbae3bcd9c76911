"""TSV-C: each expert as the leading singular triplets of its task vector."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from mergekit_vision.functional.linalg import top_svd
from mergekit_vision.functional.threads import in_threads
from mergekit_vision.merger import CompressedExpert, Merged, MergeInputs, Merger, ModelKind, check_whole

Pair = tuple[Tensor, Tensor]
"""``U Σ [m, k]`` and ``Vᵀ [k, n]``."""


@dataclass(frozen=True)
class TSVC(Merger):
    """Experts as low-rank factors of their task vectors; no merge, as it must know each image's task.

    Of every two-dimensional parameter, task ``t`` uses ``W_0 + SVD_k(Δ_t)``; other parameters are averaged over the experts. A
    task costs ``k (m + n)`` float32 numbers for each matrix ``[m, n]``, the singular values multiplied into one factor.

    Source: Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging" (CVPR 2025), TSV-Compress.

    Args:
        rank: triplets of each matrix; ``None`` is ``min(m, n) // T``, as published, so that all tasks together take little more
            than one model.
    """

    title: ClassVar[str] = "TSV-Compress"
    paper: ClassVar[str] = (
        "Gargiulo et al., Task Singular Vectors: Reducing Task Interference in Model Merging, CVPR 2025, arXiv:2412.00081"
    )
    kind: ClassVar[ModelKind] = "oracle"

    rank: int | None = None

    def __post_init__(self) -> None:
        check_whole(self, 1, "rank", others="min(d_out, d_in) // T")

    def merge(self, inputs: MergeInputs) -> Merged:
        """Decompose the matrices, average the rest."""
        matrices = inputs.matrices()
        factors = inputs.spread_changed(
            partial(self._factors, inputs), [key for key in inputs.base if key in matrices], "experts"
        )
        rest = [key for key in inputs.base if key not in matrices]
        update = inputs.spread_changed(lambda key: inputs.deltas(key).mean(0), rest, "averaging")
        experts = {}
        for t, task in enumerate(inputs.tasks):
            size = sum(part.nbytes for pairs in factors.values() for part in pairs[t])
            experts[task] = CompressedExpert(size, partial(_update, update, factors, t))
        return Merged(update, fixed=frozenset(update), experts=experts)

    def _factors(self, inputs: MergeInputs, key: str) -> list[Pair]:
        rank = min(inputs.base[key].shape) // len(inputs.tasks) if self.rank is None else self.rank

        def factors(task: str) -> Pair:
            U, S, Vh = top_svd(inputs.delta(task, key), rank)
            return U * S, Vh

        return in_threads(factors, inputs.tasks)


def _update(shared: dict[str, Tensor], factors: dict[str, list[Pair]], task: int) -> dict[str, Tensor]:
    return {**shared, **{key: pairs[task][0] @ pairs[task][1] for key, pairs in factors.items()}}
