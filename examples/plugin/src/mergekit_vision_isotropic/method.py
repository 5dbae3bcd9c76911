"""Iso-C merging."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.functional import polar
from mergekit_vision.merger import Merged, MergeInputs, Merger

Other = Literal["isotropic", "mean"]


def isotropic(M: Tensor) -> Tensor:
    """A matrix with the singular vectors of ``M`` and, for every singular value, the mean of those of ``M``.

    With the thin SVD ``M = U Σ Vᵀ`` that is ``mean(Σ) U Vᵀ``: the polar factor times the mean singular value, for which no SVD is
    needed. Directions that ``M`` maps to zero stay zero: their singular vectors are arbitrary, and an SVD would pick some.

    Args:
        M: ``[m, n]``, float32 or float64.

    Returns:
        ``[m, n]``, in the dtype of ``M``.

    >>> import torch
    >>> isotropic(torch.diag(torch.tensor([3.0, 1.0])))
    tensor([[2., 0.],
            [0., 2.]])
    """
    found = polar(M)
    return found.factor * (found.nuclear_norm / min(M.shape))


@dataclass(frozen=True)
class Isotropic(Merger):
    """Isotropic merging in the common subspace: the sum of the task vectors with a flat spectrum.

    The sum's few large singular values are what the tasks have in common; they drown the directions of single tasks. A flat
    spectrum gives all directions the same weight.

    Source: Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces" (ICML 2025),
    Iso-C. Parameters that are no matrices are averaged. The scaling coefficient, 1 by default, multiplies everything; it is
    chosen on validation data.

    Args:
        other: how the matrices outside of the blocks, ``visual.proj`` and ``visual.positional_embedding``, are merged:
            "isotropic" like the rest (published) or "mean".
    """

    title: ClassVar[str] = "Iso-C"
    paper: ClassVar[str] = (
        "Marczak et al., No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces, ICML 2025, "
        "arXiv:2502.04959"
    )

    other: Other = "isotropic"

    def __post_init__(self) -> None:
        if self.other not in get_args(Other):
            raise InputError(f"Isotropic: other is {self.other!r}, but must be one of {', '.join(get_args(Other))}")

    def merge(self, inputs: MergeInputs) -> Merged:
        """Merge parameter by parameter; one that no expert changed keeps its pre-trained value."""
        blocks = {linear.weight for linear in inputs.linears}

        def merged(key: str) -> Tensor | None:
            if not inputs.any_changed(key):
                return None
            deltas = inputs.deltas(key)  # [T, *shape]
            flat = deltas.dim() == 3 and (key in blocks or self.other == "isotropic")
            return isotropic(deltas.sum(0)) if flat else deltas.mean(0)

        # with several processes, each merges a share of the parameters
        found = inputs.spread(merged, inputs.base, "merging")
        return Merged({key: value for key, value in found.items() if value is not None})
