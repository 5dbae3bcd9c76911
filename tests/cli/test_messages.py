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
            "--scale must be a number or one of merger, search, agreement, not seach (did you mean `search`?)",
        ),
        (["--route", "orcle"], "--route must be one of router, oracle, base, not orcle (did you mean `oracle`?)"),
        (["--merger.rank", "x"], "--merger.rank must be a whole number or energy, not x"),
        (["--merger.norm", "detla"], "--merger.norm must be one of delta, truncated, not detla (did you mean `delta`?)"),
        (["--experts", "mnist"], "--experts must be a list such as '[a, b]', not mnist"),
        (["--data.batch_size", "many"], "--data.batch_size must be a whole number, not many"),
        (["--config", "nowhere.yaml"], "--config: File does not exist"),
        (["--output"], "--output needs a value"),
        (["stray"], "stray: no option of this command\n"),
        (["suite.yaml", "ESM"], "suite.yaml ESM: no option of this command; give -s suite.yaml -m ESM\n"),
    ],
)
def test_what_a_value_must_be(
    options: list[str], message: str, tiny_suite: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["mergekit-vision"])
    assert main(["test", "--suite", str(tiny_suite), "--merger", "ESM", *options]) == 1
    assert capsys.readouterr().err.startswith(f"mergekit-vision: error: {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "-m", "ESM"], "--suite is missing; give -s FILE, or -s demo"),
        (["merge", "-s", "SUITE"], "name a method: -m NAME (`mergekit-vision methods` lists them)"),
        (["test", "-s", "SUITE"], "give one of --merger (merge now) and --merged ("),
        (["predict", "-s", "SUITE", "-m", "Average"], ("--task, --images are", "--images is missing", "--task is missing")),
        (["predict", "-s", "SUITE", "-m", "Average", "--images", "."], "--task is missing"),
        (
            ["merge", "-s", "SUITE", "--merger.rank", "8"],
            "--merger.rank is a parameter of a method; name the method too: -m NAME",
        ),
        (["--suite", "suite.yaml"], "--suite: not a command; begin with one, mergekit-vision COMMAND --suite suite.yaml; "),
        (
            ["test", "-s", "SUITE", "--merged", "gone"],
            "gone: not a merged model (no such directory); make one with mergekit-vision merge -o DIR",
        ),
    ],
)
def test_what_is_missing(
    arguments: list[str],
    message: str | tuple[str, ...],
    tiny_suite: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["mergekit-vision"])
    assert main([str(tiny_suite) if word == "SUITE" else word for word in arguments]) == 1
    assert capsys.readouterr().err.removeprefix("mergekit-vision: error: ").startswith(message)
