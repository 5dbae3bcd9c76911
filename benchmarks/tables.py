"""Rows of results as tables: on the terminal, and in Markdown."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.records import MEASURES, Row

APART = ("suite", "model", "layers")
"""Parameters of which each combination has a table of its own."""


class Layout(NamedTuple):
    """A table of plain texts.

    Attributes:
        title: what all its rows have in common.
        head: of its columns.
        lines: as many cells each.
    """

    title: str
    head: list[str]
    lines: list[list[str]]


def layouts(rows: Iterable[Row]) -> Iterator[Layout]:
    """Tables of the rows of one benchmark, in their order."""

    def apart(row: Row) -> list[str | int | None]:
        return [row.case.get(name) for name in APART]

    rows = list(rows)
    kinds = list(map(apart, rows))
    for _, part in groupby(sorted(rows, key=lambda row: kinds.index(apart(row))), apart):
        yield _layout(list(part))


def _layout(rows: Sequence[Row]) -> Layout:
    names = list(dict.fromkeys(name for row in rows for name in row.case))
    alike = {name for name in names if name in APART or (len(rows) > 1 and len({row.case.get(name) for row in rows}) == 1)}
    measures = [name for name in MEASURES if any(name in row.values for row in rows)] or ["failed"]
    varying = [name for name in names if name not in alike]
    title = ", ".join(f"{name.replace('_', ' ')} {rows[0].case[name]}" for name in names if name in alike)
    lines = []
    for row in rows:
        cells = [_value(row, name) for name in measures]
        if row.failed:
            cells = [f"failed: {row.failed}", *cells[1:]]
        lines.append([*(str(row.case.get(name, "")) for name in varying), *cells])
    heads = [MEASURES[name].head if name in MEASURES else name for name in measures]
    return Layout(title, [*(name.replace("_", " ") for name in varying), *heads], lines)


def _value(row: Row, name: str) -> str:
    if name not in row.values:
        return ""
    low, high = row.spread.get(name, [0.0, 0.0])
    write: Callable[[float], str] = (lambda value: f"{value:.1e}") if "error" in name else _plain
    return write(row.values[name]) + (f" ({write(low)} to {write(high)})" if low != high else "")


def _plain(value: float) -> str:
    """Three digits, and all of what stands before the point.

    >>> _plain(1341.8), _plain(0.10449), _plain(8.0)
    ('1342', '0.104', '8.00')
    """
    if abs(value) >= 100 or value == 0:
        return f"{value:.0f}"
    return f"{value:#.3g}".rstrip(".")


def show(rows: Iterable[Row]) -> None:
    """Print the tables."""
    for layout in layouts(rows):
        table = Table(*layout.head, title=layout.title, title_justify="left")
        for line in layout.lines:
            table.add_row(*line)
        Console(width=180).print(table)


def markdown(rows: Iterable[Row]) -> str:
    """The tables for a page."""
    parts = []
    for layout in layouts(rows):
        cells = [[cell.replace("|", "\\|") for cell in line] for line in layout.lines]
        lines = [layout.head, ["---"] * len(layout.head), *cells]
        parts.append(f"{layout.title}:\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)
