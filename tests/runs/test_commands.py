"""The `compare` command from end to end: its files, its one table, interruptions, and two processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergekit_vision.cli.main import main
from mergekit_vision.plugins.ties import TIES

FILES = {"config.yaml", "methods.png", "report.html", "results.json", "tasks.png"}
Command = Callable[..., int]


@pytest.fixture
def command(tiny_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setattr(sys, "argv", ["mergekit-vision"])
    monkeypatch.chdir(tmp_path)

    def run(name: str, *options: str) -> int:
        return main([name, "--suite", str(tiny_suite), "--trainer.accelerator", "cpu", *options])

    return run


def rows(directory: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads((directory / "results.json").read_text())["rows"]}


def test_files_and_one_table(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("compare", "--mergers", "[TaskArithmetic, ESMPP]", "--model.scale", "merger", "--output", "all") == 0
    printed = capsys.readouterr().out
    assert {path.name for path in (tmp_path / "all").iterdir()} == FILES
    assert printed.count("┏") == 1, "one table"
    for row in rows(tmp_path / "all").values():
        assert any(row["name"] in line and f"{100 * row['mean']['accuracy']:.1f}" in line for line in printed.splitlines())


def test_an_interrupted_run_keeps_what_was_finished(
    command: Command, tmp_path: Path, merges: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--mergers", "[Average, TIES]", "--model.scale", "merger", "--output", "out")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TIES, "merge", interrupt)
        assert command("compare", *options) == 130
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    assert command("compare", *options) == 0
    assert merges == ["Average", "TIES", "TIES"]
    with monkeypatch.context() as patch:
        before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        patch.setattr("mergekit_vision.reports.html.render", interrupt)
        assert command("compare", *options) == 130
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(before), "no draft is left behind"
    assert (tmp_path / "out" / "report.html").read_bytes() == before["report.html"]


def test_two_processes_find_what_one_finds(command: Command, tmp_path: Path, tiny_suite: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MERGEKIT_VISION_CACHE": str(tmp_path / "cache")}
    options = ["--mergers", "SMILE", "--model.scale", "merger", "--trainer.accelerator", "cpu"]
    arguments = [sys.executable, "-m", "mergekit_vision", "compare", "--suite", str(tiny_suite), *options]
    process = subprocess.run(
        [*arguments, "--trainer.devices", "2", "--output", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("┏") == 1, "only the first process reports"
    assert command("compare", *options, "--output", "one") == 0
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, row in one.items():
        for key in ("tasks", "routing", "extra_parameters"):
            assert two[name].get(key) == row.get(key), (name, key)
