"""Search of the merged task vector's scaling coefficient on validation data."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mergekit_vision.errors import InputError

_MOST_HALVINGS = 50  # no more make a difference to numbers of 64 bits


@dataclass(frozen=True)
class ScaleSearch:
    """How the scaling coefficient is searched.

    The accuracy rises from the backbone's, has one broad top, and falls steeply where the update destroys the features; where the
    top lies differs between methods by more than a factor of ten. So the search doubles the coefficient, beginning at ``first``,
    until the score has fallen twice, and then halves the interval around the best.

    Args:
        low: start of the range; not evaluated itself, it is (for 0) the backbone.
        high: end of the range.
        first: distance of the first coefficient from ``low``. A power of two, so that 1, most methods' own, is among the tried.
        halvings: refinements around the best; each costs two evaluations at most.
    """

    low: float = 0.0
    high: float = 3.0
    first: float = 0.125
    halvings: int = 2

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise InputError(f"`search.low` ({self.low}) must be below `search.high` ({self.high}), both finite", of="model")
        if not 0 < self.first < math.inf:
            raise InputError(f"`search.first` ({self.first}) must be above 0 and finite", of="model")
        if not 0 <= self.halvings <= _MOST_HALVINGS:
            raise InputError(f"`search.halvings` must lie in 0 to {_MOST_HALVINGS}, not {self.halvings}", of="model")

    def doubled(self) -> list[float]:
        """The coefficients of the first stage, ascending.

        >>> ScaleSearch().doubled()
        [0.125, 0.25, 0.5, 1.0, 2.0, 3.0]
        """
        steps, step = [], self.first
        while step < self.high - self.low:
            steps.append(self.low + step)
            step *= 2
        return [*steps, self.high]


def search_scale(
    evaluate: Callable[[Sequence[float]], Sequence[float]], search: ScaleSearch, at_once: int = 1
) -> tuple[float, dict[float, float]]:
    """Find the coefficient with the highest score.

    Args:
        evaluate: scores of some coefficients; called once for each that is tried.
        search: range and effort.
        at_once: coefficients that one call of ``evaluate`` takes, at most. The result does not depend on it, but above 1 some may
            be evaluated that the search then does not need.

    Returns:
        The best coefficient (the smaller of equals) and every coefficient tried with its score, in the order tried.

    >>> best, tried = search_scale(lambda some: [-abs(c - 0.8) for c in some], ScaleSearch())
    >>> best, len(tried)
    (0.75, 10)
    """
    tried: dict[float, float] = {}

    def scored(coefficients: Sequence[float]) -> Iterator[tuple[float, float]]:
        for start in range(0, len(coefficients), at_once):
            part = coefficients[start : start + at_once]
            yield from zip(part, evaluate(part), strict=True)

    def best() -> float:
        return max(sorted(tried), key=lambda coefficient: tried[coefficient])

    fallen = 0
    for coefficient, score in scored(search.doubled()):
        tried[coefficient] = score
        fallen = fallen + 1 if score < tried[best()] else 0
        if fallen == 2:
            break
    for _ in range(search.halvings):
        center = best()
        below = max((c for c in tried if c < center), default=search.low)
        above = min((c for c in tried if c > center), default=center)
        between = dict.fromkeys([(below + center) / 2, (center + above) / 2])
        tried.update(scored([coefficient for coefficient in between if coefficient not in tried]))
    return best(), tried
