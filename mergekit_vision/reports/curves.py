"""Rows of a comparison that differ in one number, as curves."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_vision.reports.noise import deviation
from mergekit_vision.reports.style import RULE, WIDTH, empty_figure, legend, named, strokes
from mergekit_vision.support.json_files import readable, to_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEAST = 3  # points of a curve
_DECADES = 8  # times the smallest number, above which the axis is logarithmic
_LABEL = 64  # letters of a line's name
TASKS = "tasks"
TITLES = {"proxies.n": "proxy images per task", TASKS: "number of tasks", "scale": "scaling coefficient"}
"""What some settings are called in words."""


class Point(NamedTuple):
    """A row on a curve.

    Attributes:
        x: the number in which it differs.
        y: mean accuracy; of numbers of tasks the normalized one, since tasks are of different difficulty. In [0, 1].
        deviation: of the mean accuracy over draws of proxy images; 0 where there was one.
    """

    x: float
    y: float
    deviation: float = 0.0


class Curve(NamedTuple):
    """Rows of one method that differ in one number.

    Attributes:
        label: the method, and what else is otherwise than by default.
        points: by their number, ascending.
    """

    label: str
    points: Sequence[Point]


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Curve]]:
    """Name of a setting -> the curves of rows that differ in it alone.

    >>> from mergekit_vision.reports.curves import curves
    >>> def row(rank, mean):
    ...     settings = {"rank": rank, "route": "router"}
    ...     merger = {"name": "SMILE", "class_path": "plugins.SMILE"}
    ...     return {"merger": merger, "settings": settings, "differs": ["rank"], "mean": {"accuracy": mean}}
    >>> curves([row(8, 0.6), row(4, 0.5), row(16, 0.7)])["rank"][0].points[0]
    Point(x=4.0, y=0.5, deviation=0.0)
    """
    methods = [row for row in rows if "settings" in row]
    names = dict.fromkeys(name for row in methods for name in row["settings"])
    found = {name: list(_curves_of(name, methods)) for name in names if not name.endswith("seed")}
    return {name: lines for name, lines in found.items() if lines}


def _curves_of(name: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[Curve]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if _is_number(row["settings"].get(name)):
            others = {key: value for key, value in row["settings"].items() if key != name}
            groups.setdefault(to_json([row["merger"]["class_path"], others]), []).append(row)
    for group in groups.values():
        known = [row for row in group if row["mean"][_scored(name)] is not None]
        points = {point.x: point for point in (_point(name, row) for row in known)}
        if len(points) >= _LEAST:
            yield Curve(_label(name, group), [points[x] for x in sorted(points)])


def _point(name: str, row: Mapping[str, Any]) -> Point:
    return Point(float(row["settings"][name]), row["mean"][_scored(name)], (deviation(row) or 0.0) if name != TASKS else 0.0)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _scored(name: str) -> str:
    return "normalized" if name == TASKS else "accuracy"


def _label(name: str, group: Sequence[Mapping[str, Any]]) -> str:
    differing = dict.fromkeys(key for row in group for key in row["differs"] if key != name)
    settings = group[0]["settings"]
    return ", ".join([group[0]["merger"]["name"], *(f"{key} {readable(settings[key])}" for key in differing)])


def draw_curves(name: str, lines: Sequence[Curve]) -> "Figure":
    """Mean accuracy by a setting, one line a method.

    Args:
        name: of the setting.
        lines: the curves.
    """
    labels = [named(line.label, _LABEL) for line in lines]
    with empty_figure(WIDTH, 3.6) as figure:
        axes = figure.add_subplot()
        for line, label, stroke in zip(lines, labels, strokes(), strict=False):
            x, y = [point.x for point in line.points], [100 * point.y for point in line.points]
            spread = [100 * point.deviation for point in line.points] if any(point.deviation for point in line.points) else None
            axes.errorbar(x, y, spread, **stroke, linewidth=1.6, marker="o", markersize=4, capsize=3, label=label)
        ticks = sorted({point.x for line in lines for point in line.points})
        if ticks[0] > 0 and ticks[-1] > _DECADES * ticks[0]:
            axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(color=RULE, linewidth=0.7)
        axes.set_xlabel(named(TITLES.get(name, name)))
        axes.set_ylabel("mean over tasks, % of the experts" if name == TASKS else "mean accuracy over tasks, %")
        legend(figure, labels)
    return figure
