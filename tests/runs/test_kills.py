"""Runs that are killed, or asked to end: what they write is the old or the new, whole, and a later run is like any other."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killing import at_once, files_in, killed_after, signaled_after, signaled_at
from pictures import image
from small_models import STATIC, small_models

from mergekit_vision.cli.main import main
from mergekit_vision.export.manifest import CARD, RECORD, read_record
from mergekit_vision.support.files import WORK

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are killed in a fork")

SIGNALS = [signal.SIGINT, signal.SIGTERM]
TIMES = pytest.mark.parametrize("times", [1, pytest.param(60, marks=pytest.mark.slow)])
SUITE = "suite/suite.yaml"
COMMANDS: dict[str, list[str]] = {
    "merge": ["-s", SUITE, "-m", "TIES", "-o", "out"],
    "compare": ["-s", SUITE, "--mergers", "[Average, TIES]", "--scale", "0.5", "-o", "out"],
    "predict": ["-s", SUITE, "--merged", "static", "--task", "colors", "--images", "photos", "-o", "out"],
    "test": ["-s", SUITE, "--merged", "static", "-o", "out"],
    "export": ["--merged", "static", "--to", "open_clip", "-o", "out"],
}
OF_TIME = ("seconds", "files", "sha256")  # of merge.json, the card's checksum


def some_quick(*quick: str) -> list[Any]:
    """All commands, of which only some are tried in every run of the tests."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS]


@pytest.fixture
def place(tiny_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a merged model and photos."""
    (tmp_path / "suite").symlink_to(tiny_suite.parent)
    small_models(tiny_suite)(tmp_path / "static", STATIC)
    (tmp_path / "photos").mkdir()
    for number in range(5):
        image(number).save(tmp_path / "photos" / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def whole(directory: Path) -> dict[str, object]:
    """The files of a run but for times; fails where one is not whole."""
    found: dict[str, object] = {}
    if (directory / RECORD).exists():
        read_record(directory)
    for name, content in files_in(directory).items():
        if name == CARD:  # it has times in its text, and the record vouches for it
            found[name] = len(content) > 0
        elif name.endswith(".json"):
            found[name] = without_times(json.loads(content))
        elif name == "report.html":
            assert content.rstrip().endswith(b"</html>")
        elif name.endswith(".png"):
            assert content.endswith(b"IEND\xaeB`\x82")
        else:
            found[name] = content
    return found


def without_times(content: object) -> object:
    if isinstance(content, dict):
        return {key: without_times(value) for key, value in content.items() if key not in OF_TIME}
    return [without_times(value) for value in content] if isinstance(content, list) else content


@TIMES
@pytest.mark.parametrize("command", some_quick("compare", "export"))
def test_killed_at_any_moment(place: Path, command: str, times: int) -> None:
    def interrupt(moment: float, run: Callable[[], int]) -> None:
        killed_after(moment, lambda: os._exit(run()))

    ends_old_or_new(place, command, times, interrupt)


@pytest.mark.slow
@pytest.mark.parametrize("sent", SIGNALS)
@pytest.mark.parametrize("command", COMMANDS)
def test_asked_to_end_at_any_moment(place: Path, command: str, sent: signal.Signals) -> None:
    statuses = []

    def interrupt(moment: float, run: Callable[[], int]) -> None:
        statuses.append(signaled_after(moment, sent, run))

    ends_old_or_new(place, command, 20, interrupt)
    assert 128 + sent in statuses
    assert set(statuses) <= {0, 128 + sent}


@pytest.mark.parametrize(("sent", "number"), [(signal.SIGINT, 20), (signal.SIGTERM, 44)])
def test_asked_to_end_while_a_model_is_written(place: Path, sent: signal.Signals, number: int) -> None:
    """Over an older one: among its files, and among the links that make them the model."""
    out = place / "out"
    shutil.copytree(place / "static", out)
    before = files_in(out)
    assert signaled_at(number, sent, lambda: main(["merge", *COMMANDS["merge"]]), within=f"out/{WORK}") == 128 + sent
    assert files_in(out) == before or read_record(out)["merger"]["name"] == "TIES"
    assert read_record(out)
    assert not (out / WORK).exists()


def ends_old_or_new(place: Path, command: str, times: int, interrupt: Callable[[float, Callable[[], int]], None]) -> None:
    """Interrupt a command at random moments; what it leaves is a part of what it writes, and then it runs through."""

    def run() -> int:
        return main([command, *COMMANDS[command]])

    def complete() -> None:
        assert run() == 0

    start = time.perf_counter()
    at_once(complete)
    took, expected, moments = time.perf_counter() - start, whole(place / "out"), random.Random(0)
    for number in range(times):
        if number % 2 == 0:  # over nothing, and not over the results of the run before
            shutil.rmtree(place / "out")
            (place / "out").mkdir()
        interrupt(moments.uniform(took / 3, took), run)
        found = whole(place / "out")
        assert found.items() <= expected.items()
        assert command != "export" or found in ({}, expected)
    at_once(complete)
    assert whole(place / "out") == expected
    assert not (place / "out" / WORK).exists()
