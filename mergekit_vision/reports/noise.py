"""Which differences between rows of a comparison are more than noise.

Two things are left to chance. The images of a test split are a sample: an accuracy ``p`` on ``n`` of them has the standard error
``sqrt(p (1 - p) / n)``. And so are the proxy images: over ``k`` draws with the standard deviation ``s``, a mean has the standard
error ``s / sqrt(k)``. Both add up as variances. One row is better than another where it leads by more than twice the standard
error of the difference. The two rows are taken as independent. They are not, since they see the same test images; so this
overstates the noise, and what it calls better is.
"""

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]

_ERRORS = 2.0  # standard errors of the difference that a lead must exceed


def leads(row: Row, others: Iterable[Row], task: str | None = None) -> bool:
    """Whether a row is better than all others, in its mean over tasks or on one ``task``.

    >>> from mergekit_vision.reports.noise import leads
    >>> def row(accuracy):
    ...     return {"mean": {"accuracy": accuracy}, "tasks": {"mnist": {"accuracy": accuracy, "n": 1000}}}
    >>> leads(row(0.80), [row(0.77)]), leads(row(0.80), [row(0.76)])
    (False, True)
    """
    return all(is_better(row, other, task) for other in others)


def is_better(row: Row, other: Row, task: str | None = None) -> bool:
    """Whether a row leads another by more than noise."""
    lead = _accuracy(row, task) - _accuracy(other, task)
    return lead > _ERRORS * math.hypot(standard_error(row, task), standard_error(other, task))


def chance(rows: Iterable[Row]) -> float:
    """How far the mean accuracies of any two of some rows may lie apart by chance."""
    return _ERRORS * math.sqrt(2) * max((standard_error(row) for row in rows), default=0.0)


def standard_error(row: Row, task: str | None = None) -> float:
    """Standard error of a row's mean accuracy, or of its accuracy on one ``task``; of accuracies in [0, 1]."""
    tasks = [row["tasks"][name] for name in ([task] if task else row["tasks"])]
    images = sum(found["accuracy"] * (1 - found["accuracy"]) / found["n"] for found in tasks) / len(tasks) ** 2
    draws = [_accuracy(draw, task) for draw in row.get("draws", ())]
    return math.sqrt(images + (statistics.variance(draws) / len(draws) if len(draws) > 1 else 0.0))


def deviation(row: Row) -> float | None:
    """Standard deviation of a row's mean accuracy over draws of proxy images, where there were several."""
    draws = [_accuracy(draw, None) for draw in row.get("draws", ())]
    return statistics.stdev(draws) if len(draws) > 1 else None


def _accuracy(row: Row, task: str | None) -> float:
    return float(row["tasks"][task]["accuracy"] if task else row["mean"]["accuracy"])
