"""The report as a document: well-formed, complete without a network, and true to results.json."""

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_up import made_up
from PIL import Image

from mergekit_vision.reports.html import NARROW, render, summary, write_comparison

VOID = {"meta", "img", "br", "link", "hr", "input"}


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

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


@pytest.fixture
def results() -> dict[str, Any]:
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
        if tag == "section":
            assert attributes["aria-labelledby"] in ids, "what a screen reader says of it"
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


def test_everything_is_in_it(page: Page, results: dict[str, Any]) -> None:
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


def test_what_is_unknown_is_left_out(results: dict[str, Any]) -> None:
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


def test_the_coefficients_text_is_of_the_rows(results: dict[str, Any]) -> None:
    def said(run: Any, *rows: Any, search: list[Any] | None = None) -> str:
        plain = results["rows"][1]
        made = [plain | {"search": search or [], "settings": {"scale": scale}} for scale in rows]
        return check(render(results | {"scale": run, "rows": [results["rows"][0], *made, results["rows"][3]]})).text

    distances = [{"coefficient": c, "distance": d} for c, d in ((0.5, 0.2), (1.0, 0.4))]
    by_agreement = said("search", "agreement", search=distances)
    assert "Distance from the experts on proxy images by coefficient" in by_agreement
    assert "accuracy on val by coefficient" not in by_agreement
    assert "searched on val from 0.0 to 3.0, first step 0.125, 2 halvings, unless the table says otherwise" in by_agreement
    assert "accuracy on val by coefficient" in said("agreement", "search", search=results["rows"][1]["search"])
    own = "Every method was used at the coefficient it sets itself"
    assert own in said("merger", "merger")
    assert "unless the table" not in said("merger", "merger")
    assert "each is the method’s own or was set by hand" in said("merger", "merger", 0.4)
    assert own not in said("merger", "merger", 0.4)
    assert "at the coefficient 0.4, set by hand" in said("merger", 0.4)
    assert "None of these methods has a coefficient to search" in said("search", "search")


def test_summary_names_the_best_of_each_kind(results: dict[str, Any]) -> None:
    assert summary(results).replace(NARROW, " ") == (
        "Plain keeps 71 % of the experts’ accuracy in one model of the same size. "
        "Clever keeps 88 % of the experts’ accuracy with 12 % more memory and a router. "
        "The pre-trained model alone, zero-shot, keeps 53 % of the experts’ accuracy."
    )


def test_a_lead_within_the_noise_is_no_win(results: dict[str, Any]) -> None:
    other = json.loads(json.dumps(results["rows"][1] | {"name": "Alike"}))
    other["mean"]["accuracy"] += 0.01
    results["rows"].insert(2, other)
    assert (
        "Alike keeps 71 % of the experts’ accuracy in one model of the same size (Plain is within the noise of it)."
        in summary(results).replace(NARROW, " ")
    )
    text = render(results)
    assert text.count('"number top"') == 2, "the dynamic model's two cells"
    assert "highest plain encoder: Alike" in text
    results["rows"][3:3] = [results["rows"][1] | {"name": name} for name in ("B", "C")]
    assert "size (all 3 others are within the noise of it)." in summary(results)
    worse = json.loads(json.dumps(results["rows"][1] | {"name": "Worse"}))
    worse["mean"]["accuracy"] = 0.01
    results["rows"].insert(1, worse)
    assert "size (3 others are within the noise of it)." in summary(results)
    for row in results["rows"]:
        for task in row["tasks"].values():
            task["n"] = 100_000
    assert "noise" not in summary(results)


def test_draws_show_their_deviation(results: dict[str, Any]) -> None:
    results["draws"] = 2
    results["rows"][1]["draws"] = [
        {"seed": 0, "scale": 0.5, "tasks": results["rows"][1]["tasks"], "mean": {"accuracy": 0.59}},
        {"seed": 1, "scale": 1.0, "tasks": results["rows"][1]["tasks"], "mean": {"accuracy": 0.61}},
    ]
    page = check(render(results))
    assert page.tables[0][2][1] == "60.0 ± 1.4"
    assert page.tables[0][2][4] == "0.5–1"
    assert "seeds 0 to 1" in page.text


def test_files_of_a_comparison(results: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="mergekit_vision"):
        write_comparison(results, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "methods.png", "tasks.png", "report.html"}
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(results))
    for name in ("methods.png", "tasks.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert min(picture.size) > 300
    table, said, place = [record.getMessage() for record in caplog.records]
    assert "Clever" in table
    assert "88.2" in table
    assert said == summary(results)
    assert place == f"report: {tmp_path / 'out' / 'report.html'}"


def test_equal_results_make_an_equal_report(page: Page, results: dict[str, Any]) -> None:
    assert Page(render(json.loads(json.dumps(results)))).elements == page.elements


def test_layers_are_named_by_what_the_encoder_says_of_them(results: dict[str, Any]) -> None:
    """Names of another architecture say nothing; block and kind are data."""
    renamed = {name: f"layer-{number}" for number, name in enumerate(results["layers"])}
    other = json.loads(json.dumps(results))
    other["layers"] = {renamed[name]: layer for name, layer in results["layers"].items()}
    other["energy"] = {renamed[name]: curve for name, curve in results["energy"].items()}
    for row in other["rows"]:
        if row.get("routing"):
            row["routing"] = {renamed[name]: shares for name, shares in row["routing"].items()}
    assert render(other) == render(results)
    assert "0 in_proj" in render(results)


def test_papers_numbers_stand_beside_ours_with_their_source(page: Page, results: dict[str, Any]) -> None:
    number = {
        "accuracy": 0.612,
        "normalized": 0.7,
        "scale": 0.3,
        "remark": "",
        "source": "A & B",
        "experts": "theirs",
        "note": "N.",
    }
    results["rows"][1]["published"] = number
    shown = check(render(results))
    assert [line[3] for line in shown.tables[0][1:]] == ["–", "61.2 (70.0)", "–", "–"]
    assert "are from A & B, for theirs. N. Plain: at the coefficient 0.3." in shown.text
    assert "papers" not in page.text.lower()
