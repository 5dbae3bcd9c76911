"""DC-Merge."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.functional.dc import dc_merge
from mergekit_vision.merger import Merged, MergeInputs, Merger, check_options, check_whole

Other = Literal["dc", "mean"]


@dataclass(frozen=True)
class DCMerge(Merger):
    """Truncated SVDs of the task vectors, merged by sign election in a shared orthogonal basis.

    Source: Zhang et al., "DC-Merge" (CVPR 2026), in the form of the authors' code for full fine-tuning. As in TSV-Merge each task
    keeps its leading singular triplets, and those of all tasks are made orthogonal. In that basis each task keeps its few largest
    coordinates, and the coordinates that have the sign of their sum are averaged; a coordinate that one task alone keeps is not
    shrunk. Parameters that are no matrices are averaged. The scaling coefficient is 1 by default; the authors choose it on
    validation data, up to 3.

    The authors' settings for LoRA experts are ``rank`` 16 and ``smoothing`` 5 (ViT-B/32) or 1 (ViT-B/16, ViT-L/14).

    Args:
        rank: singular triplets a task keeps, at most the numerical rank. Published, and the default: ``min(d_out, d_in) // T``.
        density: share of the coordinates that a task keeps, in (0, 1]. Published: 0.001, of ``min(d_out, d_in)`` squared; for a
            given ``rank`` of ``T * rank`` squared.
        smoothing: how many times the largest of a task's singular values may exceed the smallest: they are replaced by evenly
            spaced ones with the same sum. Published for full fine-tuning, and the default: they stay as they are.
        other: how the matrices outside of the blocks, ``visual.proj`` and ``visual.positional_embedding``, are merged: "dc" like
            the rest (published) or "mean".
        scale_average: whether the scaling coefficient multiplies the averaged parameters too (published), or they are added as
            they are.
    """

    title: ClassVar[str] = "DC-Merge"
    paper: ClassVar[str] = (
        "Zhang et al., DC-Merge: Improving Model Merging with Directional Consistency, CVPR 2026, arXiv:2603.06242"
    )

    rank: int | None = None
    density: float = 1e-3
    smoothing: float | None = None
    other: Other = "dc"
    scale_average: bool = True

    def __post_init__(self) -> None:
        check_whole(self, 1, "rank", others="min(d_out, d_in) // T")
        if not 0 < self.density <= 1:
            raise InputError(
                f"DCMerge: density is {self.density}, but must be a share of the coordinates in (0, 1], such as 0.001"
            )
        if self.smoothing is not None and not 1 <= self.smoothing < math.inf:
            raise InputError(f"DCMerge: smoothing is {self.smoothing}, but must be a finite ratio, 1 or more, or null for none")
        check_options(self, other=Other)

    def merge(self, inputs: MergeInputs) -> Merged:
        """Merge parameter by parameter; one that no expert changed keeps its pre-trained value."""
        spectral = inputs.matrices(everywhere=self.other == "dc")

        def merged(key: str) -> Tensor:
            deltas = inputs.deltas(key)
            return dc_merge(deltas, self.rank, self.density, self.smoothing) if key in spectral else deltas.mean(0)

        update = inputs.spread_changed(merged, inputs.base, "merging")
        return Merged(update, fixed=frozenset() if self.scale_average else frozenset(update) - spectral)
