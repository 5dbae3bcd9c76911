"""What a search of a method's parameters found: a table, a figure, and the best as a configuration file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.table import Table

from mergekit_vision.reports.style import COLORS, RULE, WIDTH, empty_figure, named, save_png
from mergekit_vision.reports.tables import percent
from mergekit_vision.support.console import as_markup, logger, show
from mergekit_vision.support.files import replacing
from mergekit_vision.support.json_files import readable, to_json, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = 20  # rows of the table
_HEIGHT = 2.6  # inches of a panel
_LABEL = 12  # letters of a value

WINNER = "winner.yaml"


def write_tuning(results: Mapping[str, Any], directory: Path) -> None:
    """Write ``results.json``, ``tuning.png`` and ``winner.yaml``, each whole, and show the table.

    Args:
        results: what :class:`~mergekit_vision.runs.tuning.Tuning` found.
        directory: made when missing.
    """
    write_json(directory / "results.json", results)
    save_png(draw_tuning(results["grid"], results["rows"]), directory / "tuning.png")
    with replacing(directory / WINNER) as draft:
        draft.write_text(_configuration(results), encoding="utf-8")
    show(tuning_table(results))
    best = results["rows"][0]
    if best["below_backbone"]:
        logger.warning("%s: below the backbone: %s", best["name"], ", ".join(best["below_backbone"]))
    logger.info("best: %s; merge with it: --config %s", best["name"], directory / WINNER)


def _configuration(results: Mapping[str, Any]) -> str:
    plain = json.loads(to_json(results["winner"], in_order=True))
    return "# chosen by agreement with the experts on unlabeled images\n" + yaml.safe_dump(
        plain, sort_keys=False, allow_unicode=True
    )


def tuning_table(results: Mapping[str, Any]) -> Table:
    """One row a combination, the best first, as in ``results.json`` of a search of parameters."""
    rows, grid = results["rows"], results["grid"]
    table = Table(title=as_markup(f"{results['suite']}: {results['merger']}, {len(rows)} combinations"), title_justify="left")
    for name in (*grid, "coefficient", "distance", "agreement\n%", "tasks below\nthe backbone", "merge\ns"):
        table.add_column(as_markup(name), justify="right")
    for row in rows[:_SHOWN]:
        values = (as_markup(readable(row["values"][name])) for name in grid)
        below, seconds = len(row["below_backbone"]), row["seconds"]["merge"]
        found = f"{row['scale']:.4g}", f"{row['distance']:.4f}", percent(row["share"]), str(below or "–"), f"{seconds:.1f}"
        table.add_row(*values, *found, style=None if row is not rows[0] else "bold")
    hidden = f" · {len(rows) - _SHOWN} more in results.json" if len(rows) > _SHOWN else ""
    table.caption = f"distance from the experts and agreement with them, on unlabeled images{hidden}"
    table.caption_justify = "left"
    return table


def draw_tuning(grid: Mapping[str, Sequence[Any]], rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Distance from the experts by each parameter: every combination a point, the best of each value joined by a line.

    Args:
        grid: parameter -> values.
        rows: the combinations, each with its ``values`` and ``distance``.
    """
    with empty_figure(WIDTH, _HEIGHT * len(grid)) as figure:
        for axes, (name, values) in zip(figure.subplots(len(grid), squeeze=False)[:, 0], grid.items(), strict=True):
            groups = [[row["distance"] for row in rows if row["values"][name] == value] for value in values]
            points = [(at, distance) for at, group in enumerate(groups) for distance in group]
            axes.plot(*zip(*points, strict=True), ".", color=COLORS["backbone"])
            axes.plot(range(len(values)), [min(group) for group in groups], color=COLORS["static"], marker="o", markersize=4)
            axes.set_xticks(range(len(values)), [named(readable(value), _LABEL) for value in values])
            axes.set_xlabel(named(name))
            axes.grid(color=RULE, linewidth=0.7)
            axes.set_ylabel("distance from experts")
    return figure
