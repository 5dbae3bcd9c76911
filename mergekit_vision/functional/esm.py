"""ESM: essential subspaces of all tasks, orthogonalized against each other and scaled on three levels.

Source: Essential Subspace Merging (CVPR 2026) and its extended version, in the form of the authors' code; step numbers below
follow it: 3 eigenvalue weights, 4 inter-task, 5 inter-dimension, 6 polar factors, 7 inter-layer scaling.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mergekit_vision.functional.esd import EssentialSubspace
from mergekit_vision.functional.linalg import polar_product

TaskNorm = Literal["delta", "truncated"]


class EssentialPart(NamedTuple):
    """What ESM merges of one task vector ``Δ``, in its dtype.

    Attributes:
        directions: essential directions ``E``, largest first, ``[d_out, k]``.
        eigenvalues: mean squared shift along each, ``[k]``, float64.
        coordinates: ``Eᵀ Δ``, ``[k, d_in]``.
        norm: of ``Δ``, a float64 scalar.
    """

    directions: Tensor
    eigenvalues: Tensor
    coordinates: Tensor
    norm: Tensor

    @classmethod
    def of(cls, delta: Tensor, subspace: EssentialSubspace) -> "EssentialPart":
        """The part of a task vector ``[d_out, d_in]`` in its essential subspace."""
        norm = torch.linalg.vector_norm(delta, dtype=torch.float64)
        return cls(subspace.directions, subspace.eigenvalues, subspace.directions.T @ delta, norm)


def esm_merge(
    deltas: Tensor,
    subspaces: Sequence[EssentialSubspace],
    *,
    eigenvalue_power: float = 0.15,
    inter_task: float = 2.0,
    inter_dimension: float = 2.0,
    gain: float = 2.0,
    norm: TaskNorm = "delta",
) -> Tensor:
    """Merge the task vectors of one weight matrix by ESM, up to the inter-layer scaling (steps 3 to 6).

    With ``E_t`` a task's essential directions and ``C_t = E_tᵀ Δ_t`` its coordinates in them, scaled as below and put side by
    side as ``E`` and ``C``, the result is ``gain * mean(σ(E)) * mean(σ(C)) * polar(E) @ polar(C)``.

    Args:
        deltas: ``[T, d_out, d_in]``, float32 or float64.
        subspaces: one a task, with ``[d_out, k_t]`` directions.
        eigenvalue_power: directions and coordinates are both weighted by their eigenvalue to this power, mean weight 1.
        inter_task: coordinates are multiplied by (task norm / mean task norm) to this power.
        inter_dimension: columns of ``C`` are multiplied by (column norm / mean column norm) to this power.
        gain: constant factor.
        norm: the task norm, of the whole task vector (the authors' code) or of its coordinates ``E_tᵀ Δ_t`` (the CVPR text).

    Returns:
        ``[d_out, d_in]`` in the dtype of ``deltas``; zero where no task has a direction.
    """
    return esm_merge_of(
        [EssentialPart.of(delta, subspace) for delta, subspace in zip(deltas, subspaces, strict=True)],
        eigenvalue_power=eigenvalue_power,
        inter_task=inter_task,
        inter_dimension=inter_dimension,
        gain=gain,
        norm=norm,
    )


def esm_merge_of(
    parts: Sequence[EssentialPart],
    *,
    eigenvalue_power: float = 0.15,
    inter_task: float = 2.0,
    inter_dimension: float = 2.0,
    gain: float = 2.0,
    norm: TaskNorm = "delta",
) -> Tensor:
    """:func:`esm_merge` by the tasks' parts, which is all that it needs of the task vectors."""
    norms = torch.stack(
        [part.norm if norm == "delta" else torch.linalg.vector_norm(part.coordinates, dtype=torch.float64) for part in parts]
    )
    weights = [eigenvalue_weights(part.eigenvalues, eigenvalue_power).to(part.coordinates.dtype) for part in parts]
    factors = _relative_power(norms, inter_task).to(parts[0].coordinates.dtype)
    scales = [factor * weight for factor, weight in zip(factors, weights, strict=True)]
    C = torch.cat([scale[:, None] * part.coordinates for scale, part in zip(scales, parts, strict=True)])
    if not C.any():
        return C.new_zeros(len(parts[0].directions), C.shape[1])
    C *= _relative_power(C.norm(dim=0), inter_dimension)
    merged = polar_product(torch.cat([part.directions * weight for part, weight in zip(parts, weights, strict=True)], 1), C)
    return merged.product * (gain * merged.left_mean * merged.right_mean)


def eigenvalue_weights(eigenvalues: Tensor, power: float) -> Tensor:
    """Weights of essential directions (step 3): the eigenvalues ``[k]`` to ``power``, divided by their mean.

    >>> eigenvalue_weights(torch.tensor([9.0, 1.0]), power=0.5)
    tensor([1.5000, 0.5000])
    """
    weights = eigenvalues**power
    return weights / weights.mean()


def inter_layer_factors(norms: Tensor, power: float) -> Tensor:
    """Factors of the layers of one kind (step 7): norms ``[L]`` of their merged task vectors over the mean, to ``power``.

    >>> inter_layer_factors(torch.tensor([1.0, 3.0]), power=2.0)
    tensor([0.2500, 2.2500])
    """
    return _relative_power(norms, power)


def _relative_power(values: Tensor, power: float) -> Tensor:
    """``(values / mean(values)) ** power``, or ones where all are zero."""
    mean = values.mean()
    return (values / mean) ** power if mean > 0 else torch.ones_like(values)
