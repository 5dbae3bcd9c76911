"""SWUDI merging."""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.functional.swudi import swudi_merge
from mergekit_vision.merger import Merged, MergeInputs, Merger, check_options

Other = Literal["mean", "base"]


@dataclass(frozen=True)
class SWUDI(Merger):
    """WUDI-Merging in closed form: the sum of the task vectors, rid of what each writes onto the inputs of the others.

    Minimizes ``Σ_t ‖(M - Δ_t) Δ_tᵀ‖² / ‖Δ_t‖²`` over the merged ``M``, from the sum of the task vectors on: Cheng et al. (ICML
    2025) by 300 steps of Adam, SWUDI (2026) by gradient flow, which a spectral filter gives at once. The scaling coefficient, 1
    by default, multiplies what is merged so, the matrices of the blocks; the mean of the others is added as it is.

    Args:
        time: for which the flow runs, in units of one over the mean eigenvalue of ``Σ_t Δ_tᵀ Δ_t / ‖Δ_t‖²``. A short one stays
            near the sum, a very long one ends in the minimum. The default was chosen here.
        share: of the directions, those of the largest eigenvalues, that move at all; in (0, 1].
        other: what all other parameters get: the "mean" of the experts', or nothing, so that they stay as in the "base"
            (published code of WUDI-Merging).
    """

    title: ClassVar[str] = "SWUDI-Merging"
    paper: ClassVar[str] = "SWUDI, 2026, arXiv:2606.07289, after Cheng et al., WUDI-Merging, ICML 2025, arXiv:2503.08099"

    time: float = 3.0
    share: float = 1.0
    other: Other = "mean"

    def __post_init__(self) -> None:
        if not 0 < self.time < math.inf:
            raise InputError(f"SWUDI: time is {self.time}, but must be a finite number above 0")
        if not 0 < self.share <= 1:
            raise InputError(f"SWUDI: share is {self.share}, but must be a share of the directions in (0, 1]")
        check_options(self, other=Other)

    def merge(self, inputs: MergeInputs) -> Merged:
        """Merge parameter by parameter, one task vector after the other."""
        blocks = inputs.matrices(everywhere=False)
        keys = [key for key in inputs.base if key in blocks or self.other == "mean"]

        def merged(key: str) -> Tensor:
            if key not in blocks:
                return inputs.deltas(key).mean(0)
            tasks = [task for task in inputs.tasks if inputs.changed(task, key)]
            return swudi_merge(map(partial(inputs.delta, key=key), tasks), self.time, self.share).float()

        update = inputs.spread_changed(merged, keys, "merging")
        return Merged(update, fixed=frozenset(update) - blocks)
