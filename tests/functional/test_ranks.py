"""Ranks by energy against a plain loop, and by what they must not do."""

from itertools import product

import formulas
import pytest
import torch
from torch import Tensor

from mergekit_vision.functional.ranks import share_out, shared_ranks


def spectra(*sizes: int, seed: int = 0) -> list[Tensor]:
    """Falling energies of all kinds of slopes and sizes."""
    generator = torch.Generator().manual_seed(seed)
    slopes = torch.rand(len(sizes), generator=generator).tolist()
    noise = [torch.rand(size, generator=generator, dtype=torch.float64) for size in sizes]
    return [
        10**at * (torch.arange(1, len(x) + 1) ** -(3 * slope) * (1 + 0.1 * x)).sort(descending=True).values
        for at, (slope, x) in enumerate(zip(slopes, noise, strict=True))
    ]


@pytest.mark.parametrize("floor", [0, 1, 4])
@pytest.mark.parametrize("costs", [None, [960, 768, 960, 768, 1]])
def test_share_out_is_the_best_one_after_the_other(floor: int, costs: list[int] | None) -> None:
    for seed in range(10):
        energies = spectra(30, 7, 24, 1, 12, seed=seed)
        least = floor * sum(costs or [1] * 5)
        for budget in (least, least + 17, least + 5000, 10**9):
            ranks = share_out(energies, budget, floor, costs)
            assert ranks == formulas.one_by_one(energies, budget, floor, costs)
            assert sum(k * cost for k, cost in zip(ranks, costs or [1] * 5, strict=True)) <= budget


def test_no_other_ranks_of_the_same_total_keep_more() -> None:
    energies, budget = spectra(4, 5, 3, seed=3), 6

    def kept(ranks: tuple[int, ...] | list[int]) -> float:
        return sum(float(energy[:k].sum() / energy.sum()) for energy, k in zip(energies, ranks, strict=True))

    every = [ranks for ranks in product(range(5), range(6), range(4)) if sum(ranks) == budget]
    assert kept(share_out(energies, budget)) == pytest.approx(max(map(kept, every)))


def test_one_decomposition_gets_all() -> None:
    assert share_out(spectra(9), budget=5) == [5]
    assert share_out(spectra(9), budget=50, floor=20) == [9]


def test_who_has_no_energy_gets_nothing() -> None:
    zero, none, half = torch.zeros(4), torch.zeros(0), torch.tensor([2.0, 0.0, 0.0])
    ranks = share_out([zero.double(), *spectra(6), none.double(), half.double()], budget=6, floor=2)
    assert ranks == [0, 5, 0, 1]
    assert share_out([zero, none], budget=3, floor=1) == [0, 0]


def test_a_floor_that_takes_the_whole_budget_gives_all_the_same() -> None:
    assert share_out(spectra(9, 9, 9), budget=12, floor=4) == [4, 4, 4]
    assert shared_ranks(spectra(9, 9, 9), rank=4, floor=1.0) == [4, 4, 4]
    with pytest.raises(ValueError, match="4 directions of each cost 12, more than the budget of 11"):
        share_out(spectra(9, 9, 9), budget=11, floor=4)


def test_equal_energies_are_dealt_out_in_turn() -> None:
    flat = [torch.ones(4, dtype=torch.float64)] * 3
    assert share_out(flat, budget=6) == [2, 2, 2]
    assert share_out(flat, budget=7) == [3, 2, 2]


@pytest.mark.parametrize(("rank", "floor", "least"), [(10, 0.1, 1), (10, 0.25, 3), (30, 0.1, 3), (3, 0.0, 0), (0, 1.0, 0)])
def test_the_floor_of_shared_ranks_is_a_share_of_the_mean(rank: int, floor: float, least: int) -> None:
    flat, steep = torch.ones(60, dtype=torch.float64), torch.logspace(0, -300, 60, dtype=torch.float64)
    first = max(least, min(rank, 1))
    assert shared_ranks([steep, flat], rank, floor) == [first, 2 * rank - first]
