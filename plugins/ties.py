"""TIES merging."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.functional.ties import Aggregate, TiesMerge, magnitude_threshold, ties_merge
from mergekit_vision.merger import Merged, MergeInputs, Merger, check_options, check_whole


@dataclass(frozen=True)
class TIES(Merger):
    """Trim small entries of the task vectors, elect a sign for every parameter, merge the entries that have it.

    Source: Yadav et al., "TIES-Merging" (NeurIPS 2023), algorithm 1, with the threshold of the published code: the m-th smallest
    magnitude of a task's whole vector, m = P - floor(P * density), is kept with all that is not smaller. Scaling coefficient 1.

    Args:
        density: share of each task vector's entries that is kept, in (0, 1]. Published: 0.2 (top 20 %).
        aggregate: what becomes of the entries with the elected sign: "mean" (published), "sum" or "max".
        count_frozen: entries of frozen tensors, such as the text tower's, that count towards P. Codes that store them keep more
            than ``density`` of the vision tower.
    """

    title: ClassVar[str] = "TIES-Merging"
    paper: ClassVar[str] = (
        "Yadav et al., TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023, arXiv:2306.01708"
    )

    density: float = 0.2
    aggregate: Aggregate = "mean"
    count_frozen: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise InputError(
                f"TIES: density is {self.density}, but must be a share of the entries in (0, 1], such as 0.2 for 20 %"
            )
        check_options(self, aggregate=Aggregate)
        check_whole(self, 0, "count_frozen")

    def merge(self, inputs: MergeInputs) -> Merged:
        """Find each task's threshold, then merge tensor by tensor; no task vector is ever held in one piece."""
        thresholds = list(inputs.spread(partial(self._threshold, inputs), inputs.tasks, "thresholds").values())
        found = inputs.spread(lambda key: self._merge_tensor(inputs, key, thresholds), inputs.base, "merging")
        update = {key: result.merged for key, result in found.items()}
        canceled = [key for key, result in found.items() if result.canceled]
        votes = sum(result.votes for result in found.values())
        # exact cancellations take the majority sign of the whole model, known only now; they were merged as if it were +1
        if votes <= 0:
            for key in canceled:
                update[key] = self._merge_tensor(inputs, key, thresholds, tie_sign=-1 if votes else 0).merged
        return Merged(update)

    def _threshold(self, inputs: MergeInputs, task: str) -> float:
        """Magnitude from which one task's entries are kept."""

        def tensors() -> Iterator[tuple[Tensor, Tensor]]:
            return (inputs.pair(task, key) for key in inputs.base)

        entries = sum(value.numel() for value in inputs.base.values())
        try:
            return magnitude_threshold(tensors, self.density, self.count_frozen, inputs.device, entries)
        except ValueError as error:
            for key in inputs.base:
                inputs.delta(task, key)  # names the tensor, where it is the expert's
            raise InputError(f"{error}: that of task {task}, whose expert is finite; look at the backbone's weights") from error

    def _merge_tensor(self, inputs: MergeInputs, key: str, thresholds: Sequence[float], tie_sign: int = 1) -> TiesMerge:
        """Merge one parameter of all tasks."""
        if not all(inputs.is_whole(task, key) for task in inputs.tasks):  # whole weights beside others start elsewhere
            deltas = inputs.deltas(key)
            return ties_merge(list(deltas), torch.zeros_like(deltas[0]), thresholds, self.aggregate, tie_sign, inputs.device)
        pairs = [inputs.pair(task, key) for task in inputs.tasks]
        return ties_merge([expert for expert, _ in pairs], pairs[0][1], thresholds, self.aggregate, tie_sign, inputs.device)
