"""``mergekit-vision methods``."""

import json

import pytest

from mergekit_vision.cli import methods as cli
from mergekit_vision.cli.main import main
from mergekit_vision.registry import Method, mergers, methods


def test_json_lists_every_method_as_its_class_describes_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {entry["name"] for entry in found} == mergers().keys()
    for entry in found:
        assert list(entry) == ["name", "title", "paper", "needs", "kind"]
        merger = mergers()[entry["name"]]
        assert entry["title"] == (merger.title or entry["name"])
        assert (entry["paper"], entry["needs"], entry["kind"]) == (merger.paper, merger.needs, merger.kind)


def test_markdown_has_a_row_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(methods())
    assert len({line.count("|") for line in lines}) == 1


def test_the_table_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in mergers())


def test_brackets_in_a_plugins_words_are_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    papers = ("Their Title [arXiv:2401.00001]", "[/abs/2401.00001]")
    theirs = [Method(f"Theirs{number}", "Ours [bold]", paper, "none", "static", "") for number, paper in enumerate(papers)]
    monkeypatch.setattr(cli, "methods", lambda: theirs)
    cli.list_methods([])
    printed = capsys.readouterr().out
    assert all(paper in printed for paper in papers)
    assert printed.count("Ours [bold]") == 2


def test_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--jsn"]) == 1
    assert "--jsn" in capsys.readouterr().err
