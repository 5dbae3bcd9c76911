"""TIES: trim, elect sign, disjoint merge.

Source: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models" (NeurIPS 2023), algorithm 1.
"""

import math
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Aggregate = Literal["mean", "sum", "max"]


class TiesMerge(NamedTuple):
    """One merged tensor, and what the sign of exact cancellations needs to know about it.

    Attributes:
        merged: shape and dtype of one task's tensor.
        votes: sum of the elected signs over the entries.
        cancelled: whether trimmed entries of the tasks, not all zero, add up to exactly zero somewhere.
    """

    merged: Tensor
    votes: int
    cancelled: bool


def magnitude_threshold(tensors: Callable[[], Iterable[Tensor]], density: float, count_frozen: int = 0) -> float:
    """The magnitude from which the entries of a task vector are kept, exact, without putting the task vector in one piece.

    With ``P`` entries it is the ``m``-th smallest magnitude, ``m = P - ⌊P · density⌋``. Keeping what is not smaller leaves one
    entry more than ``⌊P · density⌋`` (and ties): the published code does so. ``m = 0`` keeps everything.

    Non-negative float32 numbers sort like their bit patterns, so two counts, of the upper and of the lower 16 bits, find it.

    Args:
        tensors: called twice; gives the float32 tensors that make up the task vector.
        density: share of the entries to keep, in (0, 1].
        count_frozen: further entries, all zero, that count towards ``P``.

    >>> magnitude_threshold(lambda: [torch.tensor([-1.0, 2.0]), torch.tensor([[3.0], [-4.0]])], density=0.25)
    3.0
    """
    counts, entries = _histogram(_bits(tensor) >> 16 for tensor in tensors())
    total = entries + count_frozen
    # the frozen entries are the smallest there are
    m = total - math.floor(total * density) - count_frozen
    if m <= 0:
        return 0.0
    upper, below = _locate(counts, m)
    counts, _ = _histogram(bits[bits >> 16 == upper] & 0xFFFF for bits in map(_bits, tensors()))
    lower, _ = _locate(counts, m - below)
    return torch.tensor(upper << 16 | lower, dtype=torch.int32).view(torch.float32).item()


def ties_merge(deltas: Tensor, thresholds: Tensor, aggregate: Aggregate = "mean", tie_sign: int = 1) -> TiesMerge:
    """Trim, elect and merge one tensor of all tasks.

    Args:
        deltas: ``[T, *shape]``, float32.
        thresholds: ``[T]``; smaller magnitudes are trimmed, each task's by its own (:func:`magnitude_threshold`).
        aggregate: of the entries that have the elected sign: their mean, sum, or the one of largest magnitude.
        tie_sign: sign elected where the tasks cancel exactly: -1, 0 or 1. Published: the sign of :attr:`TiesMerge.votes` summed
            over the whole model.

    >>> ties_merge(torch.tensor([[1.0, 4.0, 0.1], [3.0, -5.0, 0.2]]), torch.tensor([1.0, 1.0])).merged
    tensor([ 2., -5.,  0.])
    """
    trimmed = deltas.where(deltas.abs() >= thresholds.view(-1, *[1] * (deltas.dim() - 1)), 0.0)
    # float64: whether entries cancel must not depend on the order of the tasks
    elected = trimmed.sum(0, dtype=torch.float64).sign()
    votes = int(elected.sum())
    cancelled = (elected == 0) & trimmed.any(0)
    if has_cancelled := bool(cancelled.any()):
        elected = elected.masked_fill(cancelled, tie_sign)
    elected = elected.to(deltas.dtype)
    agreeing = trimmed.where(trimmed.sign() == elected, 0.0)
    if aggregate == "max":
        merged = agreeing.abs().amax(0) * elected
    else:
        merged = agreeing.sum(0)
        if aggregate == "mean":
            merged /= agreeing.count_nonzero(0).clamp(min=1)
    return TiesMerge(merged, votes, has_cancelled)


def _bits(tensor: Tensor) -> Tensor:
    """Bit patterns of the magnitudes, flat int32."""
    return tensor.abs().flatten().view(torch.int32)


def _histogram(bins: Iterable[Tensor]) -> tuple[Tensor, int]:
    """Counts of 16-bit numbers that come in several tensors, and how many there are."""
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for part in bins:
        counts = counts.to(part.device).add_(torch.bincount(part, minlength=1 << 16))
    return counts.cpu(), int(counts.sum())


def _locate(counts: Tensor, m: int) -> tuple[int, int]:
    """Bin of the ``m``-th smallest entry (from 1), and how many entries lie in the bins below."""
    ends = counts.cumsum(0)
    found = int(torch.searchsorted(ends, m))
    return found, int(ends[found] - counts[found])
