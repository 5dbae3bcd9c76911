"""Search of the merged task vector's scaling coefficient on validation data."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ScaleSearch:
    """How the scaling coefficient is searched.

    The accuracy rises from the backbone's, has one broad top, and falls steeply where the update destroys the features; where the
    top lies differs between methods by more than a factor of ten. So the search doubles the coefficient, starting at
    ``low + (high - low) / 2**octaves``, until the score has fallen twice, and then halves the interval around the best.

    Args:
        low: start of the range; not evaluated itself, it is (for 0) the backbone.
        high: end of the range.
        octaves: how often ``high`` is halved for the first coefficient.
        halvings: refinements around the best; each costs two evaluations at most.
    """

    low: float = 0.0
    high: float = 3.0
    octaves: int = 5
    halvings: int = 2

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        if self.octaves < 1 or self.halvings < 0:
            raise ValueError(f"octaves ({self.octaves}) must be at least 1 and halvings ({self.halvings}) at least 0")


def search_scale(evaluate: Callable[[float], float], search: ScaleSearch) -> tuple[float, dict[float, float]]:
    """Find the coefficient with the highest score.

    Args:
        evaluate: score of a coefficient; called once for each that is tried.
        search: range and effort.

    Returns:
        The best coefficient (the smaller of equals) and every coefficient tried with its score, in the order tried.

    >>> best, tried = search_scale(lambda c: -abs(c - 0.8), ScaleSearch())
    >>> best, len(tried)
    (0.75, 8)
    """
    tried: dict[float, float] = {}

    def score(coefficient: float) -> float:
        if coefficient not in tried:
            tried[coefficient] = evaluate(coefficient)
        return tried[coefficient]

    def best() -> float:
        return max(sorted(tried), key=lambda coefficient: tried[coefficient])

    span, fallen = search.high - search.low, 0
    for octave in range(search.octaves, -1, -1):
        coefficient = search.low + span / 2**octave
        fallen = fallen + 1 if score(coefficient) < tried[best()] else 0
        if fallen == 2:
            break
    for _ in range(search.halvings):
        centre = best()
        below = max((c for c in tried if c < centre), default=search.low)
        above = min((c for c in tried if c > centre), default=centre)
        for coefficient in ((below + centre) / 2, (centre + above) / 2):
            score(coefficient)
    return best(), tried
