from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from tolerances import summed
from torch import Tensor

from mergekit_vision.functional import ties
from mergekit_vision.functional.ties import TiesMerge, magnitude_threshold, ties_merge


def numbers(n: int, seed: int = 0, decades: float = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator) * 10 ** (-decades * torch.rand(n, generator=generator))


def threshold(pieces: Iterable[Tensor], density: float, **options: Any) -> float:
    return magnitude_threshold(lambda: ((piece, torch.zeros_like(piece)) for piece in pieces), density, **options)


def merge(deltas: Tensor, *options: Any, **more: Any) -> TiesMerge:
    return ties_merge(list(deltas), torch.zeros_like(deltas[0]), [0.0] * len(deltas), *options, **more)


def order_statistic(values: Tensor, density: float) -> float:
    """By sorting; the number is counted from 1."""
    m = len(values) - int(len(values) * density)
    return values.abs().sort().values[m - 1].item()


@pytest.fixture(params=[1, 2], ids=lambda threads: f"{threads} threads")
def small_pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pieces and samples so small that a test's tensors have many of them, and ranges are missed now and then."""
    monkeypatch.setattr(ties, "_piece", lambda device: 512)
    monkeypatch.setattr(ties, "SAMPLE", 50)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("density", [0.001, 0.05, 0.2, 0.5, 0.999])
def test_threshold_is_the_order_statistic_bit_for_bit(density: float) -> None:
    values = numbers(10_007)
    expected = order_statistic(values, density)
    assert threshold([values[:13].view(13, 1), values[13:5000], values[5000:]], density) == expected
    assert int((values.abs() >= expected).sum()) == int(10_007 * density) + 1


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("density", [0.0005, 0.05, 0.2, 0.5, 0.999])
def test_threshold_from_many_pieces_and_a_sample_that_misleads(density: float) -> None:
    misleading = torch.ones(10_007)
    misleading[:: 6 * (10_007 // (6 * 50)) + 1] = 1e-3  # exactly the entries that are sampled
    rough = numbers(10_007).mul(4).round()
    for values in (numbers(10_007), misleading * numbers(10_007), misleading, rough, torch.arange(10_007.0)):
        assert threshold(values.split([3, 4004, 6000]), density) == order_statistic(values, density)


def test_threshold_of_rounded_weights_keeps_no_large_share_of_them_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most entries of a checkpoint in bfloat16 have changed by 0, 1 or 2 units in the last place."""
    base = numbers(100_000, decades=0).bfloat16()
    expert = (base.float() * (1 + numbers(100_000, seed=1, decades=0) / 200)).bfloat16()
    delta, sizes = expert.float() - base.float(), []
    search = ties._search
    monkeypatch.setattr(ties, "_search", lambda *args: sizes.append(len((found := search(*args))[2])) or found)
    assert magnitude_threshold(lambda: [(expert, base)], 0.2) == order_statistic(delta, 0.2)
    assert len(sizes) > 0
    assert max(sizes) < 5000


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 7, 9_999])
def test_threshold_refuses_what_is_not_finite(wrong: float, place: int) -> None:
    values = numbers(10_000)
    values[place] = wrong
    with pytest.raises(ValueError, match="NaN or infinity"):
        threshold([values], 0.2)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_threshold_refuses_many_that_are_not_finite(share: float) -> None:
    values = numbers(10_000)
    values[: int(share * len(values))] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        threshold([values], 0.2)


def test_threshold_among_equal_and_denormal_magnitudes() -> None:
    values = torch.tensor([0.0, -0.0, 1e-42, -2e-42, 3e-42, 1.0, -1.0, 1.0, 1.0, 2.0])
    for m in range(1, 10):
        assert threshold([values], 1 - m / 10 + 1e-9) == values.abs().sort().values[m - 1].item()


def test_full_density_keeps_everything() -> None:
    assert threshold([numbers(10)], 1.0) == 0.0


def test_frozen_entries_take_a_share_of_the_quota() -> None:
    values = numbers(1000)
    frozen = torch.cat([values, torch.zeros(300)])
    assert threshold([values], 0.2, count_frozen=300) == threshold([frozen], 0.2)
    assert threshold([values], 0.2, count_frozen=5000) == 0.0


def test_mean_sum_and_max_of_the_agreeing_entries() -> None:
    deltas = torch.tensor([[[1.0, -4.0]], [[2.0, 5.0]], [[-2.5, 2.0]]])
    assert merge(deltas, "mean").merged.tolist() == [[1.5, 3.5]]
    assert merge(deltas, "sum").merged.tolist() == [[3.0, 7.0]]
    assert merge(deltas, "max").merged.tolist() == [[2.0, 5.0]]
    assert merge(-deltas, "max").merged.tolist() == [[-2.0, -5.0]]


def test_cancellations_take_the_given_sign_and_are_reported() -> None:
    deltas = torch.tensor([[1.0, 3.0, 0.0], [-1.0, 1.0, 0.0]])
    assert [merge(deltas, tie_sign=sign).merged[0].item() for sign in (1, -1, 0)] == [1.0, -1.0, 0.0]
    result = merge(deltas)
    assert (result.votes, result.canceled) == (1, True)
    assert not merge(deltas[:, 1:]).canceled


def plainly(deltas: Tensor, thresholds: list[float], aggregate: str, tie_sign: int) -> tuple[Tensor, int, bool]:
    """The formula, entry by entry sums in float64."""
    trimmed = deltas.double() * (deltas.abs() >= torch.tensor(thresholds).unsqueeze(1))
    total = trimmed.sum(0)
    elected = torch.where((total == 0) & (trimmed != 0).any(0), tie_sign, total.sign())
    agreeing = trimmed * ((trimmed.sign() == elected) & (trimmed != 0))
    if aggregate == "max":
        merged = agreeing.abs().amax(0) * elected
    else:
        merged = agreeing.sum(0) / (1 if aggregate == "sum" else (agreeing != 0).sum(0).clamp(min=1))
    return merged, int(total.sign().sum()), bool(((total == 0) & (trimmed != 0).any(0)).any())


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("aggregate", ["mean", "sum", "max"])
@pytest.mark.parametrize("tie_sign", [1, -1, 0])
@pytest.mark.parametrize("tasks", [1, 2, 5, 20, 600])
def test_many_pieces_against_the_plain_formula(aggregate: str, tie_sign: int, tasks: int) -> None:
    """Among them entries that cancel exactly, or all but: there a sum in float32 has the wrong sign, or none."""
    columns = 1009 if tasks < 100 else 91
    deltas = numbers(tasks * columns, seed=3, decades=2).view(tasks, columns)
    deltas[-1, ::3] = -deltas[:-1, ::3].double().sum(0).float()
    deltas[:, 1::3] = deltas[:, 1::3].mul(2).round()
    deltas[:2, 2::30] = torch.tensor([1e-44, -1e-44])[:tasks].unsqueeze(1)
    thresholds = [0.0, 1e-44, 0.01, 0.3, 1.0] * (tasks // 5) + [0.01] * (tasks % 5)
    expected, votes, canceled = plainly(deltas, thresholds, aggregate, tie_sign)
    found = ties_merge(list(deltas), torch.zeros(columns), thresholds, aggregate, tie_sign)
    torch.testing.assert_close(found.merged.double(), expected, rtol=summed(tasks), atol=0)
    assert ((found.merged != 0) == (expected.float() != 0)).all()
    assert (found.votes, found.canceled) == (votes, canceled)


def test_weights_in_half_precision_are_subtracted_in_single() -> None:
    experts = [(numbers(999, seed).half() + 1) for seed in range(3)]
    base = numbers(999, 7, decades=0).bfloat16()
    expected = ties_merge([expert.float() - base.float() for expert in experts], torch.zeros(999), [0.1] * 3)
    assert ties_merge(experts, base, [0.1] * 3).merged.equal(expected.merged)
