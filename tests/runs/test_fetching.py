"""Everything that a suite needs, from a hub on the loopback interface; afterwards it runs without one."""

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from killing import killed_after, killed_at
from loopback_hub import LoopbackHub, point_at
from published_hub import miniature

from mergekit_vision.cli.main import main
from mergekit_vision.runs import fetching
from mergekit_vision.sources.opening import open_source
from mergekit_vision.suites.catalog import PublishedSuite
from mergekit_vision.suites.suite import Suite

NAME = "tall/ViT-B-32-20"
TASKS = ("mnist", "emnist")
"""One of the hub, one of torchvision's."""
KILLED = 150
"""The file operation at which it is killed: amid the downloads."""
EXPERT = PublishedSuite.load(NAME).tasks["mnist"].expert.split(":")[-1]


@pytest.fixture
def suite(loopback_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A suite of two published tasks on the hub."""
    others = {task: None for task in PublishedSuite.load(NAME).tasks if task not in TASKS}
    monkeypatch.setattr(sys, "argv", ["mergekit-vision"])
    return miniature(loopback_hub, NAME, tmp_path, monkeypatch, tasks=others)


def go_offline(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(hub, tmp_path / "home", monkeypatch, offline=True)
    hub.requests.clear()


def downloads(hub: LoopbackHub) -> list[str]:
    return [request for request in hub.requests if request.startswith("GET /storage/")]


def test_what_was_fetched_runs_offline(
    suite: Path, loopback_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fetch", "-s", str(suite)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == [
        "expert of mnist",
        "expert of emnist",
        "data of mnist (ylecun/mnist)",
        "data of emnist (torchvision.datasets.EMNIST)",
        NAME,
    ]
    assert all("B in " in line for line in printed[:-1])
    loopback_hub.requests.clear()
    assert main(["fetch", "-s", str(suite)]) == 0
    assert downloads(loopback_hub) == []
    assert capsys.readouterr().out.count("was here, and is whole") == 4
    go_offline(loopback_hub, tmp_path, monkeypatch)
    assert main(["test", "-s", str(suite), "-m", "Average", "-o", str(tmp_path / "out")]) == 0
    assert loopback_hub.requests == []
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["hub"]["mnist"]["commit"] == loopback_hub.repositories["dataset", "ylecun/mnist"].refs["main"]


def test_what_cannot_be_had_is_listed_and_all_else_is_fetched(
    suite: Path, loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experts, data = (loopback_hub.repositories[key] for key in (("model", "nik-dim/tall_masks"), ("dataset", "ylecun/mnist")))
    experts.gated = data.gated = True
    assert main(["fetch", "-s", str(suite)]) == 1
    missing = capsys.readouterr().err.splitlines()
    assert missing[0].endswith(f"{suite}: missing 3 of 4")
    assert ["hf auth login" in line for line in missing[1:]] == [True] * 3
    assert [line.split(":")[0].strip() for line in missing[1:]] == [
        "expert of mnist",
        "expert of emnist",
        "data of mnist (ylecun/mnist)",
    ]
    experts.gated, data.gated, data.private = False, False, True
    assert main(["fetch", "-s", str(suite)]) == 1
    head, line = capsys.readouterr().err.splitlines()
    assert head.endswith("missing 1 of 4")
    assert "if it is private, log in by `hf auth login` or set HF_TOKEN" in line
    data.private = False
    loopback_hub.requests.clear()
    assert main(["fetch", "-s", str(suite), "--tasks", "mnist"]) == 0
    assert len(downloads(loopback_hub)) == 2  # the two splits of what was missing


def test_what_is_missing_is_named_once(
    loopback_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error of a backbone begins with its name as well."""
    go_offline(loopback_hub, tmp_path, monkeypatch)
    assert main(["fetch", "-s", NAME, "--tasks", "mnist"]) == 1
    error = capsys.readouterr().err
    assert error.count("backbone ViT-B-32-quickgelu: ") == 1


def test_a_task_that_is_not_there(suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "-s", str(suite), "--tasks", "[mnist,emist]"]) == 1
    assert "--tasks: not in the suite: emist (did you mean `emnist`?)" in capsys.readouterr().err


def test_files_of_the_user_that_are_not_there_are_missing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = root / "suite.yaml"
    assert main(["fetch", "-s", str(suite)]) == 0
    expert = next((root / "experts").iterdir())
    expert.unlink()
    assert main(["fetch", "-s", str(suite)]) == 1
    assert f"{expert}: cannot be read (No such file or directory)" in capsys.readouterr().err


def test_a_download_that_breaks_off_goes_on_where_it_ended(
    suite: Path, loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    loopback_hub.interrupt("nik-dim/tall_masks", EXPERT, after=100_000)
    assert main(["fetch", "-s", str(suite), "--tasks", "mnist"]) == 0
    assert any("bytes=100000-" in request for request in downloads(loopback_hub))


def test_what_was_damaged_on_the_disk_is_downloaded_again(suite: Path, loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    assert main(["fetch", "-s", str(suite)]) == 0
    blobs = {path: path.read_bytes() for path in (tmp_path / "home" / "hub").glob("*/blobs/*")}
    damaged = [path for path, content in blobs.items() if b"\0" in content]
    assert len(damaged) == 4  # two experts, two splits
    for path in damaged:
        path.write_bytes(blobs[path][:-1] + b"?")
    loopback_hub.requests.clear()
    assert main(["fetch", "-s", str(suite)]) == 0
    assert len(downloads(loopback_hub)) == 4
    assert {path: path.read_bytes() for path in blobs} == blobs


def test_a_disk_that_is_too_small_is_said_before_anything_is_downloaded(
    suite: Path, loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**8))
    assert main(["fetch", "-s", str(suite)]) == 1
    assert "GB are to be downloaded and unpacked, and 0.1 GB are free" in capsys.readouterr().err
    assert downloads(loopback_hub) == []


class Fetching(NamedTuple):
    """A fetch in a process that may be killed, and what must hold afterwards."""

    suite: Path
    hub: LoopbackHub
    place: Path

    def run(self) -> None:
        main(["fetch", "-s", str(self.suite)])

    def check(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Run it again: then everything is there, and right."""
        assert main(["fetch", "-s", str(self.suite)]) == 0
        go_offline(self.hub, self.place, monkeypatch)
        suite = Suite.load(self.suite)
        for task in suite.tasks.values():
            assert suite.experts[task.name].shapes
            assert suite.experts[task.name]["visual.proj"].isfinite().all()
            for split, count in (("val", 2), ("test", 6), ("train", 18)):
                source = open_source(task.data[split])
                assert len(source) == count
                images = [source[index][0].tobytes() for index in range(count)]
                assert all(map(any, images))
        assert self.hub.requests == []


def test_after_a_kill_all_is_completed(
    suite: Path, loopback_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Fetching(suite, loopback_hub, tmp_path)
    assert killed_at(KILLED, work.run)
    work.check(monkeypatch)


def afresh(work: Fetching, name: str, monkeypatch: pytest.MonkeyPatch) -> Fetching:
    """The same with nothing on this machine."""
    place = work.place / name
    monkeypatch.setenv("MERGEKIT_VISION_CACHE", str(place / "cache"))
    point_at(work.hub, place / "home", monkeypatch)
    return work._replace(place=place)


@pytest.mark.slow
def test_after_kills_at_any_moment_all_is_completed(
    suite: Path, loopback_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, kills = 0, 0
    while killed_at(number, (work := afresh(Fetching(suite, loopback_hub, tmp_path), str(number), monkeypatch)).run):
        work.check(monkeypatch)
        number, kills = number + 23, kills + 1
    assert kills > 10


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_after_signals_all_is_completed(
    by: signal.Signals, suite: Path, loopback_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tenths in range(1, 15, 2):
        work = afresh(Fetching(suite, loopback_hub, tmp_path), str(tenths), monkeypatch)
        killed_after(tenths / 10, work.run, by)
        assert not list((work.place / "cache").rglob(".mergekit-vision"))
        work.check(monkeypatch)
