"""The table and the figure of a search of parameters."""

import io
from itertools import product

from rich.console import Console

from mergekit_vision.reports.tuning import draw_tuning, tuning_table

GRID = {"rank": [2, 4, None], "other": ["mean", "esd"]}
ROWS = [
    {
        "values": {"rank": rank, "other": other},
        "scale": 0.5,
        "share": 0.75,
        "distance": 0.1 * number,
        "below_backbone": ["dtd"] if number else [],
        "seconds": {"merge": 1.25},
    }
    for number, (rank, other) in enumerate(product(*GRID.values()))
]


def test_the_table_names_every_combination() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(tuning_table({"suite": "zoo", "merger": "ESM", "grid": GRID, "rows": ROWS}))
    lines = [line.replace("│", " ").split() for line in console.export_text().splitlines()]
    assert ["2", "mean", "0.5", "0.0000", "75.0", "–", "1.2"] in lines
    assert ["none", "esd", "0.5", "0.5000", "75.0", "1", "1.2"] in lines


def test_lines_join_the_best_of_each_value() -> None:
    rank, other = draw_tuning(GRID, ROWS).axes
    assert [round(y, 1) for y in rank.lines[1].get_ydata()] == [0.0, 0.2, 0.4]
    assert [round(y, 1) for y in other.lines[1].get_ydata()] == [0.0, 0.1]
    assert len(rank.lines[0].get_xdata()) == len(other.lines[0].get_xdata()) == len(ROWS)
    assert [tick.get_text() for tick in rank.get_xticklabels()] == ["2", "4", "none"]
