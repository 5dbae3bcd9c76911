"""What counts as better, against chance itself."""

from typing import Any

import numpy as np
import pytest

from mergekit_vision.reports.noise import chance, deviation, is_better, leads, standard_error


def row(accuracies: list[float], images: int, draws: list[float] | None = None) -> dict[str, Any]:
    tasks = {f"task{number}": {"accuracy": value, "n": images} for number, value in enumerate(accuracies)}
    found = {"tasks": tasks, "mean": {"accuracy": sum(accuracies) / len(accuracies)}}
    if draws is not None:
        found["draws"] = [{"tasks": {"task0": {"accuracy": value}}, "mean": {"accuracy": value}} for value in draws]
    return found


def test_models_that_are_alike_seldom_seem_better() -> None:
    """Two with the same true accuracies, measured on images of their own: one leads by more than noise in 2.3 % of cases."""
    generator, true, images, trials = np.random.default_rng(0), [0.9, 0.7, 0.5], 400, 4000
    counts = generator.binomial(images, true, size=(trials, 2, len(true))) / images
    wins = sum(is_better(row(list(first), images), row(list(second), images)) for first, second in counts)
    assert abs(wins / trials - 0.0228) < 4 * np.sqrt(0.0228 * 0.9772 / trials)


def test_the_error_of_a_mean_is_that_of_its_tasks_and_draws() -> None:
    found = row([0.5, 0.8], 100)
    assert standard_error(found, "task0") == pytest.approx(0.05)
    assert standard_error(found) == pytest.approx(np.sqrt(0.25 / 100 + 0.16 / 100) / 2)
    drawn = row([0.5], 10**12, draws=[0.48, 0.52, 0.5])
    assert deviation(drawn) == pytest.approx(0.02)
    assert standard_error(drawn) == pytest.approx(0.02 / np.sqrt(3))
    assert deviation(found) is None


def test_draws_make_a_lead_uncertain() -> None:
    images = 10**6
    other = row([0.50], images)
    assert is_better(row([0.52], images), other)
    assert not is_better(row([0.52], images, draws=[0.48, 0.56, 0.52]), other)
    assert not leads(row([0.52], images), [other, row([0.52], images)])


def test_no_lead_within_chance_is_called_one() -> None:
    rows = [row([0.9, 0.6], 300), row([0.8, 0.65], 300), row([0.5, 0.5], 300)]
    for lead, called in ((0.99, False), (1.01, True)):
        other = row([0.5, 0.5], 300)
        other["mean"]["accuracy"] += lead * chance(rows)
        assert is_better(other, rows[2]) == called
