"""Iso-C and Iso-CTS merging."""

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.functional.iso import flat_spectrum, iso_cts_merge
from mergekit_vision.functional.threads import in_threads
from mergekit_vision.merger import Merged, MergeInputs, Merger, check_options

Other = Literal["isotropic", "mean"]

AT_ONCE = 4
"""Parameters that are merged at once."""
SUMS_AT_ONCE = 8
"""The same of Iso-C on a CPU, where threads wait for each other less often: of whole experts, sums take little memory."""


@dataclass(frozen=True)
class _Isotropic(Merger):
    """What Iso-C and Iso-CTS share: which parameters they merge, and how the others."""

    paper: ClassVar[str] = (
        "Marczak et al., No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces, ICML 2025, "
        "arXiv:2502.04959"
    )

    other: Other = "isotropic"
    scale_average: bool = True

    def __post_init__(self) -> None:
        check_options(self, other=Other)

    @abstractmethod
    def _merged(self, inputs: MergeInputs, key: str) -> Tensor:
        """Merged task vector of one matrix."""

    def _at_once(self, inputs: MergeInputs) -> int:
        """Of how many parameters a group is."""
        return AT_ONCE

    def merge(self, inputs: MergeInputs) -> Merged:
        """Merge parameter by parameter; one that no expert changed keeps its pre-trained value."""
        flat = inputs.matrices(everywhere=self.other == "isotropic")

        def merged(key: str) -> Tensor | None:
            if not inputs.any_changed(key):
                return None
            return self._merged(inputs, key) if key in flat else inputs.deltas(key).mean(0)

        found = inputs.spread_alike(partial(in_threads, merged), inputs.base, "merging", self._at_once(inputs))
        update = {key: value for key, value in found.items() if value is not None}
        return Merged(update, fixed=frozenset() if self.scale_average else frozenset(update) - flat)


@dataclass(frozen=True)
class IsoC(_Isotropic):
    """Sum of the task vectors with a flat spectrum.

    ``W = W_0 + scale * mean(σ) U Vᵀ`` for the sum ``Σ_t Δ_t = U diag(σ) Vᵀ``: a few directions that the tasks share dominate the
    sum, and here all weigh the same.

    Source: Marczak et al., "No Task Left Behind" (ICML 2025), Iso-C. Directions that the sum does not have stay zero; published
    code gives them singular vectors at random. Parameters that are no matrices are averaged. The scaling coefficient is 1 by
    default; the paper chooses it on validation data, up to 3.

    Args:
        other: how the matrices outside of the blocks, ``visual.proj`` and ``visual.positional_embedding``, are merged:
            "isotropic" like the rest (published) or "mean".
        scale_average: whether the scaling coefficient multiplies the averaged parameters too (published), or they are added as
            they are.
    """

    title: ClassVar[str] = "Iso-C"

    def _merged(self, inputs: MergeInputs, key: str) -> Tensor:
        return flat_spectrum(inputs.total(key), dtype=torch.float32)

    def _at_once(self, inputs: MergeInputs) -> int:
        return SUMS_AT_ONCE if inputs.device.type == "cpu" and inputs.change is None else AT_ONCE


@dataclass(frozen=True)
class IsoCTS(_Isotropic):
    """Common directions of the sum plus directions of each task alone, orthogonalized, with a flat spectrum.

    Source: Marczak et al., "No Task Left Behind" (ICML 2025), Iso-CTS. The leading ``common`` of the directions are those of the
    summed task vectors. The rest is divided among the tasks; each fills its share with the leading directions of its task vector
    outside of what the common ones span. All are made orthogonal, and get the mean singular value. Parameters that are no
    matrices are averaged. The scaling coefficient is 1 by default; the paper chooses it on validation data, up to 3.

    Args:
        common: share of the directions that is common, in [0, 1]. Published: 0.8. With 1, or with too few directions to give each
            task one, it is Iso-C.
        other: how the matrices outside of the blocks, ``visual.proj`` and ``visual.positional_embedding``, are merged:
            "isotropic" like the rest (published) or "mean".
        scale_average: whether the scaling coefficient multiplies the averaged parameters too (published), or they are added as
            they are.
    """

    title: ClassVar[str] = "Iso-CTS"

    common: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.common <= 1:
            raise InputError(f"IsoCTS: common is {self.common}, but must be a share of the directions in [0, 1], such as 0.8")

    def _merged(self, inputs: MergeInputs, key: str) -> Tensor:
        return iso_cts_merge(inputs.deltas(key), self.common)
