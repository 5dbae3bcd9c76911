"""Runs that are killed: what they write is the old or the new, whole, and a later run ends as if nothing had been."""

import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
from killing import at_once, files_in, killed_after
from pictures import image
from small_models import STATIC, small_models

from mergekit_vision.cli.main import main
from mergekit_vision.support.files import WORK

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are killed in a fork")

TIMES = pytest.mark.parametrize("times", [1, pytest.param(60, marks=pytest.mark.slow)])
SUITE = "suite/suite.yaml"
COMMANDS: dict[str, list[str]] = {
    "compare": ["-s", SUITE, "--mergers", "[Average, TIES]", "--scale", "0.5", "-o", "out"],
    "predict": ["-s", SUITE, "--merged", "static", "--task", "colors", "--images", "photos", "-o", "out"],
    "test": ["-s", SUITE, "--merged", "static", "-o", "out"],
    "export": ["--merged", "static", "--to", "open_clip", "-o", "out"],
}


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
    for name, content in files_in(directory).items():
        if name.endswith(".json"):
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
        return {key: without_times(value) for key, value in content.items() if key != "seconds"}
    return [without_times(value) for value in content] if isinstance(content, list) else content


@TIMES
@pytest.mark.parametrize(
    "command", ["compare", "export", *(pytest.param(name, marks=pytest.mark.slow) for name in ("predict", "test"))]
)
def test_killed_at_any_moment(place: Path, command: str, times: int) -> None:
    def run() -> None:
        assert main([command, *COMMANDS[command]]) == 0

    start = time.perf_counter()
    at_once(run)
    took, expected, moments = time.perf_counter() - start, whole(place / "out"), random.Random(0)
    for number in range(times):
        if number % 2 == 0:  # over nothing, and not over the results of the run before
            shutil.rmtree(place / "out")
            (place / "out").mkdir()
        killed_after(moments.uniform(took / 3, took), run)
        found = whole(place / "out")
        assert found.items() <= expected.items()
        assert command != "export" or found in ({}, expected)
    at_once(run)
    assert whole(place / "out") == expected
    assert not (place / "out" / WORK).exists()
