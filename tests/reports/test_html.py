"""The report as a document: well-formed, complete without a network, and true to results.json."""

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from mergekit_vision.reports.html import NARROW, render, summary, write_comparison
from mergekit_vision.reports.tables import comparison_table

VOID = {"meta", "img", "br", "link", "hr", "input"}
TASKS = {"glyphs": (0.5, 0.9), "<b>&'signs'": (0.4, 0.8)}


class Page(HTMLParser):
    """Elements with attributes, text of table cells, and what is wrong with the nesting."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.faults: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def row(name: str, kind: str, accuracies: list[float], **more) -> dict:
    tasks = {
        task: {"accuracy": value, "normalized": value / expert, "n": 50}
        for (task, (_, expert)), value in zip(TASKS.items(), accuracies, strict=True)
    }
    mean = {key: sum(task[key] for task in tasks.values()) / len(tasks) for key in ("accuracy", "normalized")}
    worst = min(tasks, key=lambda task: tasks[task]["normalized"])
    return {"name": name, "kind": kind, "tasks": tasks, "mean": mean, "worst": worst, "extra_parameters": 0, **more}


def method(name: str, kind: str, accuracies: list[float], **more) -> dict:
    merger = {"name": name, "class_path": f"theirs.{name}", "init_args": {"rank": None, "layers": ["c_fc", "in_proj"]}}
    found = {
        "merger": merger,
        "scale": 0.5,
        "search": [],
        "seconds": {"merge": 1.25, "search": 0.0, "eval": 3.0},
        "routing": None,
    }
    return row(name, kind, accuracies, **{**found, **more})


def made_up() -> dict:
    search = [{"coefficient": c, "accuracy": 0.5, "normalized": n} for c, n in ((0.5, 0.9), (1.0, 0.7))]
    layers = [f"visual.transformer.resblocks.{block}.{kind}" for block in (0, 1) for kind in ("attn.in_proj", "mlp.c_fc")]
    curve = {"directions": [1, 4, 16], "esd": [0.5, 0.9, 1.0], "svd": [0.4, 0.8, 1.0], "per_task": 8}
    routing = {layer: dict.fromkeys(TASKS, 0.75) for layer in layers}
    return {
        "suite": "made up",
        "backbone": "local-dir:/home/someone/base",
        "pretrained": None,
        "parameters": 1_000_000,
        "experts": {task: f"{number}.safetensors" for number, task in enumerate(TASKS)},
        "tasks": {task: {"images": 50, "classes": 4} for task in TASKS},
        "split": "test",
        "scale": "search",
        "search": {"low": 0.0, "high": 3.0, "first": 0.125, "halvings": 2},
        "route": "router",
        "proxies": {"n": 32, "split": "val", "seed": 0, "label": None, "source": None},
        "seed": 0,
        "precision": "32-true",
        "device": "cpu",
        "processes": 1,
        "versions": {"mergekit_vision": "0.1", "torch": "2"},
        "rows": [
            row("zero-shot", "backbone", [0.5, 0.4]),
            method("Plain", "static", [0.6, 0.6], search=search),
            method("Clever", "dynamic", [0.8, 0.7], routing=routing, extra_parameters=120_000, scale=None),
            row("experts", "experts", [0.9, 0.8], extra_parameters=1_000_000),
        ],
        "left_out": {"Shy": "<script>alert(1)</script>"},
        "similarity": {"tasks": list(TASKS), "cosine": [[1.0, 0.1], [0.1, 1.0]]},
        "energy": dict.fromkeys(layers, curve),
    }


@pytest.fixture
def results() -> dict:
    return made_up()


@pytest.fixture(scope="module")
def page() -> Page:
    return check(render(made_up()))


def check(text: str) -> Page:
    """What every report must be; gives the parsed page."""
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert page.faults == []
    assert page.open == []
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert max(ids.values()) == 1
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe"), "nothing is loaded or run"
        assert attributes.get("aria-labeledby", next(iter(ids))) in ids
        if tag == "img":
            assert len(attributes["alt"]) > 20
            assert attributes["src"].startswith("data:image/svg+xml;base64,")
            assert int(attributes["width"]) > 0 < int(attributes["height"])
        else:
            assert not {"src", "href"} & attributes.keys()
    assert "http" not in re.sub(r'src="[^"]*"', "", text)
    assert "url(" not in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.elements
    assert "@media print" in text
    assert len(text) < 3_000_000
    return page


def test_table_says_what_the_results_say(page: Page) -> None:
    assert page.tables[0][1:] == [
        ["zero-shot", "45.0", "52.8", "<b>&'signs' 50.0", "–", "–", "0"],
        ["Plain", "60.0", "70.8", "glyphs 66.7", "0.5", "1.2 s", "0"],
        ["Clever", "75.0", "88.2", "<b>&'signs' 87.5", "–", "1.2 s", "120 k"],
        ["experts", "85.0", "100.0", "–", "–", "–", "1 M"],
    ]


def test_everything_is_in_it(page: Page, results: dict) -> None:
    pictures = [attributes["alt"] for tag, attributes in page.elements if tag == "img"]
    assert len(pictures) == 6, "methods, tasks, search, energy, similarity, one routing map"
    assert any("Plain is best at 0.5" in alt for alt in pictures)
    assert any("75" in alt and "Clever" in alt for alt in pictures)
    headings = [tag for tag, _ in page.elements if tag == "h2"]
    assert page.text.count("How to read it.") == len(headings)
    assert "<script>alert(1)</script>" in page.text, "as text"
    assert "/home/someone" not in page.text
    assert "layers\xa0=\xa0c_fc, in_proj" in page.text
    assert summary(results) in page.text


def test_what_is_unknown_is_left_out(results: dict) -> None:
    results |= {"energy": {}, "left_out": {}, "search": None, "scale": "merger"}
    results["similarity"] = {"tasks": ["glyphs"], "cosine": [[1.0]]}
    results["rows"] = [results["rows"][0], {**results["rows"][1], "search": []}]
    for found in results["rows"]:  # an expert that gets nothing right
        found["mean"]["normalized"] = None
        found["tasks"]["glyphs"]["normalized"] = None
    page = check(render(results))
    assert len([tag for tag, _ in page.elements if tag == "img"]) == 2
    assert "itself" in page.text
    assert page.tables[0][2][2] == "–"


def test_summary_names_the_best_of_each_kind(results: dict) -> None:
    assert summary(results).replace(NARROW, " ") == (
        "Plain keeps 71 % of the experts’ accuracy in one model of the same size. "
        "Clever keeps 88 % of the experts’ accuracy with 12 % more parameters and a router. "
        "The pre-trained model alone, zero-shot, keeps 53 % of the experts’ accuracy."
    )


def test_files_of_a_comparison(results: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_comparison(results, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "methods.png", "tasks.png", "report.html"}
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(results))
    for name in ("methods.png", "tasks.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert min(picture.size) > 300
    printed = capsys.readouterr().out
    assert "Clever" in printed
    assert "88.2" in printed


def test_equal_results_make_an_equal_report(page: Page, results: dict) -> None:
    assert Page(render(json.loads(json.dumps(results)))).elements == page.elements


def test_console_table_is_whole_on_a_terminal_of_80_columns(results: dict) -> None:
    results["tasks"] = {"counting": {"images": 50, "classes": 4}}
    for line in results["rows"]:
        line["tasks"], line["worst"] = {"counting": {"accuracy": 0.9999, "normalized": 1.0, "n": 50}}, "counting"
        line["name"], line["extra_parameters"] = "TaskArithmetic", 1_940_000
    console = Console(width=80)
    with console.capture() as printed:
        console.print(comparison_table(results))
    assert printed.get().count("counting 100.0") == 3
    assert printed.get().count("1.94 M") == 4
    assert "…" not in printed.get()
