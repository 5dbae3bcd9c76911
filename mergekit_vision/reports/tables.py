"""Tables for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from mergekit_vision.reports.noise import deviation
from mergekit_vision.support.console import as_markup


def results_table(results: Mapping[str, Any], title: str) -> Table:
    """One row a task, the mean last, as in ``results.json`` of an evaluation; accuracies in %."""
    table = Table(title=as_markup(title), title_justify="left")
    table.add_column("task")
    for name in ("images", "accuracy %", "normalized %"):
        table.add_column(name, justify="right")
    for task, row in results["tasks"].items():
        table.add_row(as_markup(task), str(row["n"]), percent(row["accuracy"], 2), percent(row["normalized"], 2))
    table.add_section()
    mean = results["mean"]
    total = sum(row["n"] for row in results["tasks"].values())
    table.add_row("mean", str(total), percent(mean["accuracy"], 2), percent(mean["normalized"], 2), style="bold")
    return table


def comparison_table(results: Mapping[str, Any]) -> Table:
    """One row a method, the backbone first and the experts last, as in ``results.json`` of a comparison."""
    table = Table(
        title=as_markup(f"{results['suite']}: {len(results['tasks'])} tasks, {results['split']} split"), title_justify="left"
    )
    table.add_column("method", overflow="fold")
    papers = any(row.get("published") for row in results["rows"])
    columns = ("mean\n%", *(["papers\n%"] if papers else []), "normalized\n%", "worst task,\nnormalized %", "merge\ns", "extra")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in results["rows"]:
        method, worst = row["kind"] in ("static", "dynamic", "oracle"), row["worst"]
        told = " (oracle)" if row["kind"] == "oracle" else ""
        fewer = f" ({len(row['tasks'])} tasks)" if len(row["tasks"]) < len(results["tasks"]) else ""
        table.add_row(
            as_markup(row["name"] + told + fewer),
            mean_percent(row),
            *([published(row)] if papers else []),
            percent(row["mean"]["normalized"]),
            "–" if row["kind"] == "experts" else f"{as_markup(worst)} {percent(row['tasks'][worst]['normalized'])}",
            f"{row['seconds']['merge']:.1f}" if method else "–",
            count(row["extra_parameters"]),
            style=None if method and not told else "dim",
        )
    for column in table.columns[1:]:  # a name is wrapped rather than a number cut
        column.min_width = max(Text.from_markup(str(cell)).cell_len for cell in column.cells)
    table.caption = "normalized: relative to each task's own expert · extra: memory besides one encoder, in parameters of 4 bytes"
    if any(row["kind"] == "oracle" for row in results["rows"]):
        table.caption += "\noracle: no merge; it is told each image's task"
    table.caption_justify = "left"
    return table


def mean_percent(row: Mapping[str, Any]) -> str:
    """A row's mean accuracy in percent, with the standard deviation over draws of proxy images where there were several.

    >>> from mergekit_vision.reports.tables import mean_percent
    >>> mean_percent({"mean": {"accuracy": 0.5}, "draws": [{"mean": {"accuracy": 0.49}}, {"mean": {"accuracy": 0.51}}]})
    '50.0 ± 1.4'
    """
    spread = deviation(row)
    return percent(row["mean"]["accuracy"]) + ("" if spread is None else f" ± {percent(spread)}")


def published(row: Mapping[str, Any]) -> str:
    """The mean accuracy that a paper reports for a row, in percent; in brackets the normalized one, where it does.

    >>> from mergekit_vision.reports.tables import published
    >>> published({"published": {"accuracy": 0.886, "normalized": 0.954}}), published({})
    ('88.6 (95.4)', '–')
    """
    number = row.get("published")
    if not number:
        return "–"
    return percent(number["accuracy"]) + (f" ({percent(number['normalized'])})" if number["normalized"] is not None else "")


def percent(value: float | None, digits: int = 1) -> str:
    """A share in [0, 1] in percent, without a sign.

    >>> from mergekit_vision.reports.tables import percent
    >>> percent(0.9312), percent(0.9312, 2), percent(None)
    ('93.1', '93.12', '–')
    """
    return "–" if value is None else f"{100 * value:.{digits}f}"


def count(number: int) -> str:
    """A large number with three digits.

    >>> from mergekit_vision.reports.tables import count
    >>> count(0), count(950), count(35_200), count(999_600), count(86_000_000)
    ('0', '950', '35.2 k', '1 M', '86 M')
    """
    rounded = float(f"{number:.3g}")  # 999 600 are 1 M
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if rounded >= size:
            return f"{rounded / size:.3g}{unit}"
    return str(number)
