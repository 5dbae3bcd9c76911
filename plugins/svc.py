"""SVC: a merged task vector whose singular values are calibrated by what each task has in their directions."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.functional.linalg import top_svd
from mergekit_vision.merger import Merged, MergeInputs, Merger, check_options, static_base

Other = Literal["same", "keep"]

EQUAL = 1e-6
"""Singular values of a float32 matrix that are nearer than this share of the largest: round-off chooses their directions."""


@dataclass(frozen=True)
class SVC(Merger):
    """Calibrate the singular values of a merged task vector: shrink directions that many tasks share and so count twice.

    Source: Li et al., "When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging" (ICML 2026). With a singular
    triplet ``(u, s, v)`` of a merged matrix, a task's share ``c_t`` is the coefficient at which the row ``uᵀ Δ_t`` of its own
    task vector comes nearest to the merged row ``s vᵀ``; ``s`` is divided by the mean of ``max(alpha, c_t)`` over the tasks.

    Equal singular values, such as all of a matrix that :class:`ESM` has merged, have no directions of their own: they take one
    share together, of their rows side by side.

    The result hardly depends on the coefficient of the base: matrices are calibrated as they are, without it, and the scaling
    coefficient is 1. Other parameters are taken at the base's coefficient. What the base holds fixed stays fixed.

    Args:
        base: merges what is calibrated; the sum of the task vectors where ``None``.
        alpha: least share of a task, above 0: singular values grow by at most its inverse. ``None``, and published, is
            ``1 / T``; for :class:`TSVM` as the base 1 is published.
        other: whether matrices outside of the blocks, ``visual.proj`` and ``visual.positional_embedding``, are calibrated like
            the "same" inside, or "keep" their singular values. The authors calibrate the former only.
    """

    title: ClassVar[str] = "Singular value calibration"
    paper: ClassVar[str] = (
        "Li et al., When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging, ICML 2026, arXiv:2602.05536"
    )

    base: Merger | None = None
    alpha: float | None = None
    other: Other = "same"

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise InputError(f"SVC: alpha is {self.alpha}, but must be a finite number above 0, or null for 1 / T")
        check_options(self, other=Other)

    def merge(self, inputs: MergeInputs) -> Merged:
        """Merge the base, then calibrate it matrix by matrix."""
        merged = static_base(inputs, self.base)
        chosen = inputs.matrices(everywhere=self.other == "same")
        matrices = [key for key, value in merged.update.items() if key in chosen and value.any()]
        found = inputs.spread(lambda key: self._calibrated(inputs, key, merged.update[key]), matrices, "calibrating")
        kept = {key: merged.coefficient(key) * value for key, value in merged.update.items() if key not in found}
        return Merged({**kept, **found}, fixed=merged.fixed)

    def _calibrated(self, inputs: MergeInputs, key: str, merged: Tensor) -> Tensor:
        """One matrix with calibrated singular values, holding one task vector at a time."""
        U, S, Vh = top_svd(merged.double(), min(merged.shape))
        # the number of each singular value among those that differ
        group = torch.nn.functional.pad(S[:-1] - S[1:] > EQUAL * S[0], (1, 0)).cumsum(0)

        def of_group(values: Tensor) -> Tensor:
            return torch.zeros_like(values).index_add_(0, group, values)[group]

        tasks = len(inputs.tasks)
        least = 1 / tasks if self.alpha is None else self.alpha
        total = torch.zeros_like(S)
        for task in inputs.tasks:
            rows = U.T @ inputs.delta(task, key).double()
            energy = of_group(rows.square().sum(1))
            shares = of_group(S * (rows * Vh).sum(1)) / energy.masked_fill(energy == 0, 1.0)
            total += shares.clamp(min=least)
        return ((U * (S * tasks / total)) @ Vh).to(merged.dtype)
