"""The parser's messages, as it raises them on real mistakes."""

import sys
from pathlib import Path

import pytest

from mergekit_vision.cli.main import main


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--scale", "seach"],
            "--model.scale must be a number or one of merger, search, agreement, not seach (did you mean `sea",
        ),
        (["--route", "orcle"], "--model.route must be one of router, oracle, base, not orcle (did you mean `oracle`?)"),
        (["--merger.rank", "x"], "--model.merger.rank must be a whole number, not x"),
        (["--merger.norm", "detla"], "--model.merger.norm must be one of delta, truncated, not detla (did you mean `delta`?)"),
        (["--experts", "mnist"], "--model.experts must be a list such as '[a, b]', not mnist"),
        (["--data.batch_size", "many"], "--data.batch_size must be a whole number, not many"),
        (["--config", "nowhere.yaml"], "--config: File does not exist"),
        (["--output"], "--output needs a value"),
        (["stray"], "stray: no option of this command"),
    ],
)
def test_what_a_value_must_be(
    options: list[str], message: str, tiny_suite: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["mergekit-vision"])
    assert main(["test", "--suite", str(tiny_suite), "--merger", "ESM", *options]) == 1
    assert capsys.readouterr().err.startswith(f"mergekit-vision: error: {message}")
