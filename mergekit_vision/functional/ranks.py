"""Ranks by energy: a budget of directions, shared out where they hold the most."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def share_out(energies: Sequence[Tensor], budget: int, floor: int = 0, costs: Sequence[int] | None = None) -> list[int]:
    """How many leading directions each of several decompositions keeps, so that together they keep the most energy.

    Energies are divided by the sum of their decomposition, so that all have an equal say. After the floor, directions are taken
    in the order of energy a unit of cost, as long as the budget lasts: all above one threshold. As energies fall within each
    decomposition, no choice of directions at the same cost keeps more. Of equal ones those that come first in their
    decompositions are taken first, and then those of the first decomposition.

    Args:
        energies: of each decomposition, ``[n]``, float64, 0 or more, largest first: squared singular values, or eigenvalues.
        budget: what may be spent, in units of the costs.
        floor: directions that each keeps in any case, of those it has with energy above 0; none is taken without energy.
        costs: of one direction of each decomposition; 1 where ``None``.

    Returns:
        A rank for each decomposition.

    Raises:
        ValueError: when the floor alone costs more than the budget.

    >>> share_out([torch.tensor([8.0, 1.0, 1.0]), torch.tensor([2.0, 2.0, 2.0])], budget=4)
    [1, 3]
    """
    prices = [1] * len(energies) if costs is None else list(costs)
    least = [min(floor, int((energy > 0).sum())) for energy in energies]
    left = budget - sum(price * k for price, k in zip(prices, least, strict=True))
    if left < 0:
        raise ValueError(f"{floor} directions of each cost {budget - left}, more than the budget of {budget}")
    gains, owners, places, spent = [], [], [], []
    for owner, (energy, k, price) in enumerate(zip(energies, least, prices, strict=True)):
        more = (energy[energy > 0] / energy.sum())[k:].cpu()
        gains.append(more / price)
        owners.append(torch.full((len(more),), owner))
        places.append(torch.arange(k, k + len(more)))
        spent.append(torch.full((len(more),), price))
    left = min(left, sum(int(part.sum()) for part in spent))  # as much as there is: no number is too large for torch
    order = torch.cat(places).argsort(stable=True)
    order = order[torch.cat(gains)[order].argsort(descending=True, stable=True)]
    taken = order[torch.cat(spent)[order].cumsum(0) <= left]
    more_of = torch.cat(owners)[taken].bincount(minlength=len(energies)).tolist()
    return [k + more for k, more in zip(least, more_of, strict=True)]


def shared_ranks(energies: Sequence[Tensor], rank: int, floor: float) -> list[int]:
    """Ranks of the tasks of one matrix, which all together keep as many directions as with ``rank`` for each.

    Args:
        energies: of each task, as for :func:`share_out`.
        rank: the mean rank.
        floor: share of it that each task keeps in any case, in [0, 1], rounded up to whole directions; 1 gives all the same.

    >>> shared_ranks([torch.tensor([8.0, 1.0, 1.0, 0.0]), torch.tensor([2.0, 2.0, 2.0, 2.0])], rank=2, floor=0.5)
    [1, 3]
    """
    return share_out(energies, rank * len(energies), floor=math.ceil(floor * rank - 1e-9))
