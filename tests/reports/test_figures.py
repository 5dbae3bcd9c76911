"""Pictures: what is written in them, and that equal results give equal files."""

import io
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from made_up import LAYERS, TASKS, large, made_up
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from mergekit_vision.reports.figures import (
    draw_energy,
    draw_methods,
    draw_routing,
    draw_search,
    draw_similarity,
    draw_sizes,
    draw_tasks,
)
from mergekit_vision.reports.style import as_svg, save_png

SEARCH = {
    "Plain": [{"coefficient": c, "normalized": n} for c, n in ((0.5, 0.9), (1.0, 0.7))],
    "Same": [{"coefficient": c, "normalized": n} for c, n in ((0.5, 0.9), (1.0, 0.7))],
    "Other": [{"coefficient": c, "normalized": n} for c, n in ((0.5, 0.3), (1.0, 0.7))],
}
LABELS = {name: f"{layer['block']} {layer['kind']}" for name, layer in LAYERS.items()}


def written(figure: Figure) -> set[str]:
    """All text in a figure."""
    figure.draw_without_rendering()
    return {text.get_text() for text in figure.findobj(Text)} - {""}


@pytest.fixture
def results() -> dict[str, Any]:
    return made_up()


def test_methods_are_bars_with_their_numbers(results: dict[str, Any]) -> None:
    figure = draw_methods(results["rows"])
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([45, 60, 75, 85])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["zero-shot", "Plain", "Clever", "experts"]
    assert {"45.0", "60.0", "75.0", "85.0", "(53)", "(71)", "(88)", "one plain encoder", "with routed experts"} <= written(figure)
    assert "(100)" not in written(figure)


def test_sizes_are_in_encoders_and_names_do_not_meet() -> None:
    def row(name: str, kind: str, accuracy: float, extra: int) -> dict[str, Any]:
        """One of two experts that was evaluated on one task."""
        return {"name": name, "kind": kind, "mean": {"accuracy": accuracy}, "tasks": {"a": 0}, "extra_parameters": extra}

    rows = [row("Bad", "static", 0.5, 0), row("Good", "static", 0.6, 0), row("Routed", "dynamic", 0.8, 20)]
    rows += [row("Masks", "oracle", 0.801, 20), row("Each", "experts", 0.9, 10)]
    figure = draw_sizes(rows, parameters=10)
    (axes,) = figure.axes
    points = {(float(line.get_xdata()[0]), round(float(line.get_ydata()[0]), 1)) for line in axes.lines}  # type: ignore[index]
    assert points == {(1.0, 50.0), (1.0, 60.0), (3.0, 80.0), (3.0, 80.1), (2.0, 90.0)}
    assert {"Good", "Routed", "Masks", "Each"} <= written(figure)
    assert "Bad" not in written(figure), "of those of one size, the best one is named"
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_tasks_are_a_heat_map_whose_clearly_best_methods_are_bold(results: dict[str, Any]) -> None:
    figure = draw_tasks(results["rows"])
    cells = [text for text in figure.axes[0].texts if text.get_text().isdigit()]
    assert [cell.get_text() for cell in cells] == ["50", "40", "60", "60", "80", "70", "90", "80"]
    assert [cell.get_weight() for cell in cells] == ["normal"] * 4 + ["bold"] + ["normal"] * 3, "0.7 of 50 images may be 0.6"
    assert set(TASKS) <= written(figure)


def test_similarity_leaves_the_diagonal_empty() -> None:
    figure = draw_similarity(["a", "b", "c"], [[1.0, 0.125, -0.3], [0.125, 1.0, 0.4], [-0.3, 0.4, 1.0]])
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["-0.30"] * 2 + ["0.12"] * 2 + ["0.40"] * 2


def test_routing_is_tasks_by_layers_under_their_labels() -> None:
    shares = {name: {"a": 0.5, "b": 0.25 * number} for number, name in enumerate(LAYERS)}
    figure = draw_routing(shares, LABELS)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0 in_proj", "0 c_fc", "1 in_proj", "1 c_fc"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["50"] * 4 + ["0", "25", "50", "75"]


def test_equal_searches_are_one_curve() -> None:
    figure = draw_search(SEARCH, dict.fromkeys(SEARCH, 0.5) | {"Other": 1.0})
    (axes,) = figure.axes
    curves = [line for line in axes.lines if len(line.get_xdata()) > 1]
    assert [line.get_label() for line in curves] == ["Plain, Same", "Other"]
    marks = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1]
    assert marks == [(0.5, 90.0), (1.0, 70.0)]


def test_energy_has_a_panel_for_each_kind_and_a_color_for_each_block(results: dict[str, Any]) -> None:
    figure = draw_energy(results["energy"], LAYERS)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") or axes.get_title() for axes in shown] == ["in_proj", "c_fc"]
    for axes in shown:
        solid, dashed = ([line for line in axes.lines if len(line.get_xdata()) == 3][side::2] for side in (0, 1))
        assert [list(line.get_ydata()) for line in solid] == [[50, 90, 100]] * 2
        assert [list(line.get_ydata()) for line in dashed] == [[40, 80, 100]] * 2
        assert len({line.get_color() for line in solid}) == 2
    assert {"block 0", "block 1", "ESD", "SVD"} <= written(figure)


@pytest.mark.parametrize(
    "draw",
    [
        lambda results: draw_methods(results["rows"]),
        lambda results: draw_tasks(results["rows"]),
        lambda results: draw_energy(results["energy"], results["layers"]),
        lambda results: draw_search(SEARCH, dict.fromkeys(SEARCH, 0.5)),
    ],
)
def test_equal_results_are_equal_pictures(
    results: dict[str, Any], tmp_path: Path, draw: Callable[[dict[str, Any]], Figure]
) -> None:
    first, second = (draw(results) for _ in range(2))
    assert as_svg(first) == as_svg(second)
    save_png(first, tmp_path / "deep" / "x.png")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.png"]
    with Image.open(io.BytesIO((tmp_path / "deep" / "x.png").read_bytes())) as picture:
        assert min(picture.size) > 300


def test_many_tasks_and_methods_stay_readable() -> None:
    """Twenty of each: numbers fit into their cells and beside each other, and lines are told apart."""
    rows = large()["rows"]
    bars, cells = draw_methods(rows), draw_tasks(rows)
    for figure in (bars, cells):
        figure.draw_without_rendering()
    places = [text.get_window_extent() for text in bars.axes[0].texts]
    assert not any(one.overlaps(other) for one, other in pairwise(places))
    assert max(place.x1 for place in places) <= bars.bbox.x1
    axes = cells.axes[0]
    width = axes.transData.transform((1, 0))[0] - axes.transData.transform((0, 0))[0]
    assert max(text.get_window_extent().width for text in axes.texts) < 0.9 * width
    curves = {row["name"]: row["search"] for row in rows if row.get("search")}
    search = draw_search(curves, dict.fromkeys(curves, 0.5))
    lines = [line for line in search.axes[0].lines if len(line.get_xdata()) > 1]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 20
    search.draw_without_rendering()
    assert search.legends[0].get_window_extent().x1 <= search.bbox.x1
    assert search.axes[0].get_window_extent().height > 200


def test_drawing_leaves_the_style_of_other_pictures_alone(results: dict[str, Any]) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    as_svg(draw_tasks(results["rows"]))
    assert dict(matplotlib.rcParams) == before
