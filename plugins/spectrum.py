"""Subspace Boosting and Isotropize: a merged task vector with larger small singular values, or with equal ones."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.functional.iso import flat_spectrum
from mergekit_vision.functional.linalg import top_svd
from mergekit_vision.merger import Merged, MergeInputs, Merger, check_options, static_base

Other = Literal["same", "keep"]

ROUND_OFF = 1e-6
"""Singular values of a float32 matrix below this share of the largest are round-off: nothing to enlarge."""


@dataclass(frozen=True)
class SubspaceBoosting(Merger):
    """Raise the small singular values of a merged task vector, whose directions the large ones drown.

    Source: Skorobogat et al., "Subspace-Boosted Model Merging" (2025). In each matrix, singular values are raised to the first
    one, from the largest down, at which their running sum reaches the share ``beta`` of the whole. Directions that the matrix
    does not have stay out. The scaling coefficient is that of the base, but with much larger matrices the best one is smaller.

    Args:
        base: merges what is boosted; the sum of the task vectors where ``None``.
        beta: share of the sum of the singular values, in [0, 1]. 0 raises all to the largest, 1 changes nothing. Published: 0.01.
        other: whether matrices outside of the blocks, ``visual.proj`` and ``visual.positional_embedding``, are boosted like the
            "same" inside, or "keep" their singular values (published).
    """

    title: ClassVar[str] = "Subspace Boosting"
    paper: ClassVar[str] = "Skorobogat et al., Subspace-Boosted Model Merging, 2025, arXiv:2506.16506"

    base: Merger | None = None
    beta: float = 0.01
    other: Other = "keep"

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise InputError(f"SubspaceBoosting: beta is {self.beta}, but must be a share in [0, 1], such as 0.01")
        check_options(self, other=Other)

    def merge(self, inputs: MergeInputs) -> Merged:
        """Merge the base, then boost it matrix by matrix; what the base holds fixed stays fixed."""
        return _reshaped(inputs, static_base(inputs, self.base), self._boosted, self.other)

    def _boosted(self, M: Tensor) -> Tensor:
        U, S, Vh = top_svd(M.double(), min(M.shape), ROUND_OFF)
        running = S.cumsum(0)
        first = min(int((running < self.beta * running[-1]).sum()), len(S) - 1)
        return ((U * S.clamp(min=float(S[first]))) @ Vh).to(M.dtype)


@dataclass(frozen=True)
class Isotropize(Merger):
    """Flatten the spectrum of a merged task vector: all singular values of a matrix become their mean.

    Source: Marczak et al., "No Task Left Behind" (ICML 2025), the step of Iso-C that follows the sum, after any method.
    Directions that the matrix does not have stay out. The scaling coefficient is that of the base, though a flat spectrum
    bears a larger one: for a flattened sum Iso-C takes 1.

    Args:
        base: merges what is flattened; the sum of the task vectors where ``None``.
        other: whether matrices outside of the blocks, ``visual.proj`` and ``visual.positional_embedding``, are flattened like
            the "same" inside (published) or "keep" their singular values.
    """

    title: ClassVar[str] = "Isotropization"
    paper: ClassVar[str] = (
        "Marczak et al., No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces, ICML 2025, "
        "arXiv:2502.04959"
    )

    base: Merger | None = None
    other: Other = "same"

    def __post_init__(self) -> None:
        check_options(self, other=Other)

    def merge(self, inputs: MergeInputs) -> Merged:
        """Merge the base, then flatten it matrix by matrix; what the base holds fixed stays fixed."""
        return _reshaped(inputs, static_base(inputs, self.base), partial(flat_spectrum, tol=ROUND_OFF), self.other)


def _reshaped(inputs: MergeInputs, merged: Merged, function: Callable[[Tensor], Tensor], other: Other) -> Merged:
    """A merged model with a function of each of its matrices that is not zero; they scale alike."""
    matrices = inputs.matrices(everywhere=other == "same")
    changed = [key for key, value in merged.update.items() if key in matrices and value.any()]
    found = inputs.spread(lambda key: function(merged.update[key]), changed, "spectra")
    return replace(merged, update={**merged.update, **found})
