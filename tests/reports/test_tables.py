"""Tables on a terminal."""

from typing import Any

import pytest
from made_up import made_up
from rich.console import Console
from rich.table import Table

from mergekit_vision.reports.tables import comparison_table, results_table


def printed(table: Table, width: int = 80) -> str:
    console = Console(width=width)
    with console.capture() as text:
        console.print(table)
    return text.get()


@pytest.fixture
def results() -> dict[str, Any]:
    return made_up()


def test_console_table_is_whole_on_a_terminal_of_80_columns(results: dict[str, Any]) -> None:
    results["tasks"] = {"counting": {"images": 50, "classes": 4}}
    for line in results["rows"]:
        line["tasks"], line["worst"] = {"counting": {"accuracy": 0.9999, "normalized": 1.0, "n": 50}}, "counting"
        line["name"], line["extra_parameters"] = "TaskArithmetic", 1_940_000
    text = printed(comparison_table(results))
    assert text.count("counting 100.0") == 3
    assert text.count("1.94 M") == 4
    assert "…" not in text


def test_a_long_name_is_wrapped_and_no_number_is_cut(results: dict[str, Any]) -> None:
    results["rows"][1]["name"] = "ESM, second class only, at a coefficient set by hand"
    results["rows"][1]["draws"] = [{"mean": {"accuracy": value}} for value in (0.59, 0.61)]
    text = printed(comparison_table(results))
    assert "…" not in text
    assert "60.0 ± 1.4" in text
    name = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert "ESM, second class only, at a coefficient set by hand" in " ".join(name)


def test_a_comparison_says_what_the_results_say(results: dict[str, Any]) -> None:
    lines = [line.replace("│", " ").split() for line in printed(comparison_table(results), width=120).splitlines()]
    assert ["zero-shot", "45.0", "52.8", "<b>&'signs'", "50.0", "–", "0"] in lines
    assert ["Clever", "75.0", "88.2", "<b>&'signs'", "87.5", "1.2", "120", "k"] in lines
    assert ["experts", "85.0", "100.0", "–", "–", "1", "M"] in lines


def test_papers_numbers_have_a_column(results: dict[str, Any]) -> None:
    assert "papers" not in printed(comparison_table(results))
    results["rows"][1]["published"] = {"accuracy": 0.612, "normalized": None}
    lines = [line.replace("│", " ").split() for line in printed(comparison_table(results), width=120).splitlines()]
    assert ["Plain", "60.0", "61.2", "70.8", "glyphs", "66.7", "1.2", "0"] in lines


def test_an_evaluation_is_one_row_a_task_and_the_mean(results: dict[str, Any]) -> None:
    row = results["rows"][1]
    text = printed(results_table({"tasks": row["tasks"], "mean": row["mean"]}, "Plain [at] 0.5"))
    lines = [line.replace("│", " ").split() for line in text.splitlines()]
    assert ["glyphs", "50", "60.00", "66.67"] in lines
    assert ["mean", "100", "60.00", "70.83"] in lines
    assert "Plain [at] 0.5" in text


def test_what_is_not_known_is_a_dash() -> None:
    row = {"accuracy": 0.5, "normalized": None, "n": 10}
    text = printed(results_table({"tasks": {"glyphs": row}, "mean": {"accuracy": 0.5, "normalized": None}}, "title"))
    assert text.count("–") == 2
