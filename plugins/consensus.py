"""Consensus merging with TALL masks."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.merger import Merged, MergeInputs, Merger, check_whole, static_base


@dataclass(frozen=True)
class ConsensusTA(Merger):
    """Sum of the task vectors without the entries that fewer than two tasks need.

    A task needs an entry where its own change is large against what the other tasks add to it:
    ``|τ_t| > threshold * |τ - τ_t|`` with the sum ``τ`` of the task vectors. An entry that fewer than ``agreeing`` tasks need
    keeps its pre-trained value.

    Source: Wang et al., "Localizing Task Information for Improved Model Merging and Compression" (ICML 2024), Consensus TA. The
    authors choose a threshold for each task from 0.2 to 0.6 by the task's accuracy on labeled validation data; here one serves
    all, so that no label is needed. Scaling coefficient: that of the base, 0.3 for the sum.

    Args:
        threshold: the higher, the fewer entries a task needs; 0 or more.
        agreeing: tasks that must need an entry; more than there are count as all of them. Published: 2. With 1, entries that
            nobody needs are removed; with 0, none.
        base: merges the task vectors into ``τ``; their sum where ``None``. Published too, as Consensus TIES: TIES with aggregate
            "sum". Its scaling coefficient and fixed keys are taken over.
    """

    title: ClassVar[str] = "Consensus TA"
    paper: ClassVar[str] = (
        "Wang et al., Localizing Task Information for Improved Model Merging and Compression, ICML 2024, arXiv:2405.07813"
    )

    threshold: float = 0.6
    agreeing: int = 2
    base: Merger | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < math.inf:
            raise InputError(f"ConsensusTA: threshold is {self.threshold}, but must be a finite number, 0 or more")
        check_whole(self, 0, "agreeing")

    def merge(self, inputs: MergeInputs) -> Merged:
        """Merge parameter by parameter; one that no expert changed keeps its pre-trained value."""
        base = None if self.base is None else static_base(inputs, self.base)

        def merged(key: str) -> Tensor:
            deltas = inputs.deltas(key)
            # in float64 a float32 sum is as good as exact, and no mask depends on the order of the tasks
            total = base.update[key].to(inputs.device, torch.float64) if base else deltas.sum(0, dtype=torch.float64)
            return (total * (self._votes(deltas, total) >= min(self.agreeing, len(deltas)))).float()

        update = inputs.spread_changed(merged, base.update if base else inputs.base, "merging")
        return Merged(update, base.scale if base else 0.3, base.fixed.intersection(update) if base else frozenset())

    def _votes(self, deltas: Tensor, total: Tensor) -> Tensor:
        """How many tasks need each entry."""
        votes = torch.zeros_like(total, dtype=torch.int32)
        for delta in deltas:
            votes += delta.abs() > self.threshold * (total - delta).abs()
        return votes
