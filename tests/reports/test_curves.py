"""Rows that differ in one number, as curves."""

from typing import Any

from mergekit_vision.reports.curves import Curve, Point, curves, draw_curves


def row(mean: float, differs: tuple[str, ...] = (), **settings: Any) -> dict[str, Any]:
    """A row of a method with three settings."""
    given = {"rank": None, "route": "router", "tasks": 8, **settings}
    merger = {"name": "SMILE", "class_path": "theirs.SMILE"}
    return {"merger": merger, "settings": given, "differs": differs, "mean": {"accuracy": mean, "normalized": 2 * mean}}


def test_rows_that_differ_in_nothing_else_are_a_curve() -> None:
    ranks = [row(0.1 * rank, ("rank",), rank=rank) for rank in (4, 1, 2)]
    oracle = [row(0.11 * rank, ("rank", "route"), rank=rank, route="oracle") for rank in (1, 2, 4)]
    found = curves([{"name": "zero-shot"}, row(0.9), *ranks, *oracle, row(0.8, rank=8, tasks=2)])
    assert found == {
        "rank": [
            Curve("SMILE", [Point(1, 0.1), Point(2, 0.2), Point(4, 0.4)]),
            Curve("SMILE, route oracle", [Point(1, 0.11), Point(2, 0.22), Point(4, 0.44)]),
        ]
    }


def test_two_rows_and_other_methods_are_none() -> None:
    other = {**row(0.3, rank=3), "merger": {"name": "SMILE", "class_path": "ours.SMILE"}}
    assert curves([row(0.1, rank=1), row(0.2, rank=2), other, row(0.4, rank=True), row(0.5, rank="8")]) == {}


def test_means_over_other_tasks_are_shares_of_the_experts() -> None:
    (line,) = curves([row(0.1 * tasks, tasks=tasks) for tasks in (2, 3, 4)])["tasks"]
    assert [point.y for point in line.points] == [0.2 * tasks for tasks in (2, 3, 4)]


def test_a_curve_is_drawn_where_its_points_are() -> None:
    figure = draw_curves("rank", [Curve("A", [Point(1, 0.5), Point(4, 0.6), Point(64, 0.7)])])
    (axes,) = figure.axes
    (line,) = axes.lines
    assert list(line.get_xdata()) == [1, 4, 64]
    assert list(line.get_ydata()) == [50, 60, 70]
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in figure.legends[0].get_texts()] == ["A"]
