"""EMR merging: each expert as one bit a weight and one number on a unified task vector."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mergekit_vision.functional.masks import pack_bits, unpack_bits
from mergekit_vision.merger import CompressedExpert, Merged, MergeInputs, Merger, ModelKind


class _Unified(NamedTuple):
    """One parameter: the unified task vector and, by task, its packed mask and the mean magnitudes of ``τ_t`` and ``m_t τ``."""

    vector: Tensor
    masks: list[Tensor]
    own: list[float]
    masked: list[float]


@dataclass(frozen=True)
class EMR(Merger):
    """Experts as masks and scales of one unified task vector; no merge, as it must know each image's task.

    Each entry of the unified vector ``τ`` has the sign of the sum of the task vectors and the largest magnitude among those with
    that sign. Task ``t`` uses ``θ_0 + λ_t m_t ∘ τ`` with ``m_t = [τ_t τ > 0]``, where ``λ_t`` restores the magnitude:
    ``Σ mean|τ_t| / Σ mean|m_t ∘ τ|``, sums of the means over each parameter tensor, so that a bias counts as much as a matrix. A
    task costs one bit a weight and one number; ``τ`` is stored once.

    Source: Huang et al., "EMR-Merging: Tuning-Free High-Performance Model Merging" (NeurIPS 2024), as in the authors' code. An
    entry whose sum is exactly 0 counts as negative, as there.
    """

    title: ClassVar[str] = "EMR-Merging"
    paper: ClassVar[str] = "Huang et al., EMR-Merging: Tuning-Free High-Performance Model Merging, NeurIPS 2024, arXiv:2405.17461"
    kind: ClassVar[ModelKind] = "oracle"

    def merge(self, inputs: MergeInputs) -> Merged:
        """Unify parameter by parameter, then scale each task."""
        parts = inputs.spread_changed(partial(_unify, inputs), inputs.base, "masks")
        found = {key: _Unified(*part) for key, part in parts.items()}
        update = {key: one.vector for key, one in found.items()}
        experts = {}
        for t, task in enumerate(inputs.tasks):
            size = sum(one.masks[t].nbytes for one in found.values()) + 4  # the scale, as float32
            experts[task] = CompressedExpert(size, partial(_update, found, t))
        shared = sum(vector.nbytes for vector in update.values())
        return Merged(update, fixed=frozenset(update), experts=experts, shared_bytes=shared)


def _unify(inputs: MergeInputs, key: str) -> tuple[Tensor, list[Tensor], list[float], list[float]]:
    """The fields of a :class:`_Unified`, plain, as processes send them to each other."""
    deltas = inputs.deltas(key)
    sign = torch.where(deltas.sum(0, dtype=torch.float64) > 0, 1.0, -1.0)  # float64: no sign depends on the order of the tasks
    agreeing = deltas * sign > 0
    magnitude = (deltas.abs() * agreeing).amax(0)
    masked = [float((magnitude * mask).mean(dtype=torch.float64)) for mask in agreeing]
    own = [float(delta.abs().mean(dtype=torch.float64)) for delta in deltas]
    return (sign * magnitude).float(), [pack_bits(mask) for mask in agreeing], own, masked


def _update(found: dict[str, _Unified], task: int) -> dict[str, Tensor]:
    masked = sum(one.masked[task] for one in found.values())
    scale = sum(one.own[task] for one in found.values()) / masked if masked else 0.0
    return {key: scale * one.vector * unpack_bits(one.masks[task], one.vector.shape) for key, one in found.items()}
