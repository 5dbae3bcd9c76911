"""Names that act where they are written: in tables, spreadsheets, figures, reports and on terminals."""

import csv
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import made_up
from rich.console import Console

from mergekit_vision.cli.main import main
from mergekit_vision.cli.methods import markdown_table
from mergekit_vision.registry import Method
from mergekit_vision.reports.figures import draw_methods, draw_routing, draw_similarity, draw_tasks
from mergekit_vision.reports.html import render, write_comparison
from mergekit_vision.reports.style import as_svg, save_png
from mergekit_vision.reports.tables import comparison_table, results_table
from mergekit_vision.runs.predictions import Predictions
from mergekit_vision.support.terminal import harmless

FORMULAS = ["=cmd|' /C calc'!A0", "+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "'=1", "'plain"]
PLAIN = ["plain", "a=b", "1-1", "", " =1", 'with "quotes", and commas', "new\nline"]
NAMES = {
    "a script": "<script>alert(1)</script>",
    "quotes": "\" onload='alert(1)'",
    "a link": "javascript:alert(1)",
    "one dollar": "cost $5",
    "a formula": r"$\frac{1}$",
    "a broken formula": r"$\nothing{$",
    "another script": "日本語 العربية हिन्दी",
    "a picture": "🦜",
    "letters from right to left": "\u202eabc",
    "a long name": "x" * 5000,
    "lines": "a\nb",
    "an escape code": "\x1b[2J\x07",
    "markup": "[red]x[/red] [/]",
    "backslashes": "\\[x] \\",
    "a bar": "a|b",
}


@pytest.mark.parametrize("name", [*FORMULAS, *PLAIN])
def test_a_cell_is_no_formula_and_gives_its_text_back(name: str, tmp_path: Path) -> None:
    predictions = Predictions("task", (name, "other"), (Path(name),), top=1)
    predictions.add(torch.tensor([0]), torch.tensor([[0.9, 0.1]]))
    predictions.write(tmp_path / "predictions.csv")
    with (tmp_path / "predictions.csv").open(newline="", encoding="utf-8") as stream:
        _, (image, label, probability) = csv.reader(stream)
    assert probability == "0.900000"
    for cell, text in ((image, str(Path(name))), (label, name)):
        assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
        assert cell.removeprefix("'") == text


def test_a_file_name_that_is_not_utf_8_is_written_as_it_is(tmp_path: Path) -> None:
    name = os.fsdecode(b"x\xe9.png")
    predictions = Predictions("task", ("a",), (Path(name),))
    predictions.add(torch.tensor([0]), torch.tensor([[1.0]]))
    predictions.write(tmp_path / "predictions.csv")
    assert (tmp_path / "predictions.csv").read_bytes().splitlines()[1] == b"x\xe9.png,a,1.000000"


def renamed(name: str) -> dict[str, Any]:
    """A comparison in which whatever can have a name has this one."""
    text = json.dumps(made_up())
    for known in ("glyphs", "made up", "Plain", "Shy"):
        text = text.replace(json.dumps(known)[1:-1], json.dumps(name)[1:-1])
    return dict(json.loads(text))


def test_a_report_shows_any_name_and_does_not_obey_it() -> None:
    before, after = (render(renamed(name)) for name in ("plain", " ".join(NAMES.values())))
    assert after.count("<") == before.count("<"), "no new element"
    assert after.count(' src="') == before.count(' src="')
    assert not re.search(r"""\s(href|on\w+|style)\s*=\s*["']""", after.replace("&#34;", "").replace("&#39;", "")), (
        "nothing to act"
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_is_drawn_with_any_name(name: str, tmp_path: Path) -> None:
    results = renamed(NAMES[name])
    tasks = list(results["rows"][0]["tasks"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Matplotlib currently does not support Devanagari")  # older versions
        for figure in (
            draw_methods(results["rows"]),
            draw_tasks(results["rows"]),
            draw_similarity(tasks, [[1.0, 0.5], [0.5, 1.0]]),
            draw_routing({"layer": dict.fromkeys(tasks, 0.5)}, {"layer": NAMES[name]}),
        ):
            save_png(figure, tmp_path / "x.png")
            assert max(figure.get_size_inches()) < 12
            assert as_svg(figure).startswith(b"<?xml")


@pytest.mark.parametrize("name", NAMES)
def test_a_table_shows_any_name_and_the_terminal_does_not_obey_it(name: str) -> None:
    results, console = renamed(NAMES[name]), Console(width=20_000, force_terminal=False)
    with console.capture() as printed:
        console.print(comparison_table(results))
        console.print(results_table({**results, **results["rows"][0]}, NAMES[name]))
    text = printed.get()
    assert harmless(NAMES[name]).splitlines()[0] in text
    assert not {"\x1b", "\x07"} & set(text)


def test_a_report_is_written_with_letters_that_are_none(tmp_path: Path) -> None:
    write_comparison(renamed("\udcff"), tmp_path)
    assert "&#56575;" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_an_error_does_not_reach_the_terminal_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "--suite", f"{tmp_path}/\x1b]0;title\x07.yaml", "-m", "Average"]) == 1
    printed = capsys.readouterr().err
    assert "\ufffd]0;title\ufffd.yaml" in printed
    assert not {"\x1b", "\x07"} & set(printed)


def test_a_bar_in_a_markdown_table_is_no_column() -> None:
    text = markdown_table([Method("A", "title", None, "none", "static", "x | y")])
    assert text.splitlines()[-1] == r"| `A` | static | – | x \| y | – |"
