"""TALL masks: each expert as one bit a weight on the sum of all task vectors."""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.functional.masks import pack_bits, unpack_bits
from mergekit_vision.merger import CompressedExpert, Merged, MergeInputs, Merger, ModelKind


@dataclass(frozen=True)
class TALLMasks(Merger):
    """Experts as masks of the sum of all task vectors; no merge, as it must know each image's task.

    Task ``t`` uses the entries of the sum ``τ`` at which its own change is large against what the others add:
    ``θ_0 + m_t ∘ τ`` with ``m_t = [|τ_t| > threshold * |τ - τ_t|]``. A task costs one bit a weight; ``τ`` is stored once.

    Source: Wang et al., "Localizing Task Information for Improved Model Merging and Compression" (ICML 2024). The authors choose
    a threshold for each task from 0.2 to 0.6 on labeled validation data; here one serves all, so that no label is needed.

    Args:
        threshold: the higher, the fewer entries a task uses; 0 or more.
    """

    title: ClassVar[str] = "TALL masks"
    paper: ClassVar[str] = (
        "Wang et al., Localizing Task Information for Improved Model Merging and Compression, ICML 2024, arXiv:2405.07813"
    )
    kind: ClassVar[ModelKind] = "oracle"

    threshold: float = 0.4

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < math.inf:
            raise InputError(f"TALLMasks: threshold is {self.threshold}, but must be a finite number, 0 or more")

    def merge(self, inputs: MergeInputs) -> Merged:
        """Sum up the task vectors, and mask the sum for each task."""
        found = inputs.spread_changed(partial(self._masked, inputs), inputs.base, "masks")
        update = {key: total for key, (total, _) in found.items()}
        experts = {
            task: CompressedExpert(sum(masks[t].nbytes for _, masks in found.values()), partial(_update, found, t))
            for t, task in enumerate(inputs.tasks)
        }
        shared = sum(total.nbytes for total in update.values())
        return Merged(update, fixed=frozenset(update), experts=experts, shared_bytes=shared)

    def _masked(self, inputs: MergeInputs, key: str) -> tuple[Tensor, list[Tensor]]:
        """The sum of one parameter, and each task's packed mask."""
        deltas = inputs.deltas(key)
        total = deltas.sum(0, dtype=torch.float64)  # in float64 no mask depends on the order of the tasks
        masks = [pack_bits(delta.abs() > self.threshold * (total - delta).abs()) for delta in deltas]
        return total.float(), masks


def _update(found: dict[str, tuple[Tensor, list[Tensor]]], task: int) -> dict[str, Tensor]:
    return {key: total * unpack_bits(masks[task], total.shape) for key, (total, masks) in found.items()}
