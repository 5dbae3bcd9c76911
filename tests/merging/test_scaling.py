"""The search itself, on scores with a known top."""

import math
from collections.abc import Callable, Sequence

import pytest

from mergekit_vision.errors import InputError
from mergekit_vision.merging.scaling import ScaleSearch, search_scale


def bump(top: float, width: float = 0.5) -> Callable[[float], float]:
    """Rises from the left, one broad top, broken (and flat) far to the right: the shape of a coefficient's accuracy."""
    return lambda c: math.exp(-((math.log(c / top) / width) ** 2))


def each(score: Callable[[float], float]) -> Callable[[Sequence[float]], list[float]]:
    return lambda some: [score(coefficient) for coefficient in some]


@pytest.mark.parametrize("top", [0.05, 0.125, 0.25, 0.375, 0.8, 1.0, 1.5, 2.9])
def test_finds_the_top_wherever_it_is(top: float) -> None:
    best, tried = search_scale(each(bump(top)), ScaleSearch())
    assert abs(math.log(best / top)) < math.log(1.35)
    assert best == max(tried, key=tried.get)
    assert len(tried) <= 10


def test_evaluates_no_coefficient_twice_and_none_outside_the_range() -> None:
    calls: list[float] = []
    search_scale(each(lambda c: calls.append(c) or -abs(c - 0.7)), ScaleSearch(low=0.5, high=2.0))
    assert len(calls) == len(set(calls))
    assert all(0.5 < c <= 2.0 for c in calls)


def test_stops_going_up_once_the_score_has_fallen_twice() -> None:
    _, tried = search_scale(each(bump(0.1)), ScaleSearch(halvings=0))
    assert max(tried) < 1.0


def test_goes_on_after_one_noisy_dip() -> None:
    scores = {0.125: 1.0, 0.25: 0.9, 0.5: 2.0, 1.0: 3.0, 2.0: 1.0, 3.0: 0.0}
    best, _ = search_scale(each(lambda c: scores[c]), ScaleSearch(halvings=0))
    assert best == 1.0


def test_the_smaller_of_equal_coefficients_wins() -> None:
    best, _ = search_scale(each(lambda c: 1.0), ScaleSearch())
    assert best == min(search_scale(each(lambda c: 1.0), ScaleSearch())[1])


@pytest.mark.parametrize("top", [0.05, 0.25, 0.8, 2.9])
def test_more_at_once_changes_nothing_but_the_number_of_calls(top: float) -> None:
    calls: list[int] = []

    def scores(some: Sequence[float]) -> list[float]:
        calls.append(len(some))
        return each(bump(top))(some)

    best, tried = search_scale(scores, ScaleSearch(), at_once=2)
    assert (best, tried) == search_scale(each(bump(top)), ScaleSearch())
    assert list(tried) == list(search_scale(each(bump(top)), ScaleSearch())[1])
    assert max(calls) == 2
    assert len(tried) <= sum(calls) <= len(tried) + 1
    assert len(calls) <= 5


@pytest.mark.parametrize("wrong", [{"low": 1.0, "high": 1.0}, {"first": 0.0}, {"halvings": -1}])
def test_refuses_a_meaningless_range(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        ScaleSearch(**wrong)
