"""The `compare` command on a tiny suite: its numbers, what it remembers, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mergekit_vision import InputError, MergedCLIP, MergeInputs, Merger, Proxies, Trainer, VisionTasks
from mergekit_vision.__main__ import main
from mergekit_vision.merger import Merged
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.plugins.esmpp import ESMPP
from mergekit_vision.plugins.task_arithmetic import TaskArithmetic
from mergekit_vision.plugins.ties import TIES
from mergekit_vision.registry import default_mergers
from mergekit_vision.runs.conditions import of_merger

FILES = {"config.yaml", "methods.png", "report.html", "results.json", "tasks.png"}
SMALL = ("--model.search.halvings", "0")


class Shy(Merger):
    """Refuses every suite."""

    def merge(self, inputs: MergeInputs) -> Merged:
        raise InputError("not this one")


class Demanding(Merger):
    """Cannot be made without an argument."""

    def __init__(self, gain: float) -> None:
        self.gain = gain

    def merge(self, inputs: MergeInputs) -> Merged:
        raise AssertionError("never reached")


@pytest.fixture
def command(tiny_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["mergekit-vision"])
    monkeypatch.chdir(tmp_path)

    def run(name: str, *options: str) -> int:
        return main([name, "--suite", str(tiny_suite), "--trainer.accelerator", "cpu", *options])

    return run


@pytest.fixture
def compare(tiny_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Compare from Python; gives the results, of which nothing is drawn or written."""
    found: list[dict] = []
    monkeypatch.setattr("mergekit_vision.reports.html.write_comparison", lambda results, _: found.append(results))

    def run(mergers: list[str] | str, data: dict | None = None, **model: object) -> dict:
        trainer = Trainer(default_root_dir=str(tmp_path / "out"), accelerator="cpu")
        trainer.compare(MergedCLIP(**model), VisionTasks(str(tiny_suite), **(data or {})), mergers)
        return json.loads(json.dumps(found[-1]))

    return run


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the methods that were really merged."""
    names: list[str] = []
    merge = Workbench.merge

    def counting(self, merger, *arguments, **named):
        names.append(type(merger).__name__)
        return merge(self, merger, *arguments, **named)

    monkeypatch.setattr(Workbench, "merge", counting)
    return names


def results(directory: Path) -> dict:
    return json.loads((directory / "results.json").read_text())


def rows(directory: Path) -> dict[str, dict]:
    return {row["name"]: row for row in results(directory)["rows"]}


def test_rows_are_what_the_test_command_finds(command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("compare", "--mergers", "[TaskArithmetic, ESMPP]", *SMALL, "--output", "all") == 0
    printed = capsys.readouterr().out
    assert {path.name for path in (tmp_path / "all").iterdir()} == FILES
    found = rows(tmp_path / "all")
    assert set(found) == {"zero-shot", "TaskArithmetic", "ESMPP", "experts"}
    for name in ("TaskArithmetic", "ESMPP"):
        assert command("test", "--model.merger", name, "--model.scale", "search", *SMALL, "--output", name) == 0
        alone = results(tmp_path / name)
        for key in ("tasks", "mean", "scale", "search", "merger"):
            assert found[name][key] == alone[key], key
        assert found[name]["routing"] == alone.get("routing")
    assert command("test", "--model.merger", "TaskArithmetic", "--model.scale", "0", "--output", "zero") == 0
    assert found["zero-shot"]["tasks"] == results(tmp_path / "zero")["tasks"]
    assert {task["normalized"] for task in found["experts"]["tasks"].values()} == {1.0}
    assert printed.count("┏") == 1, "one table"
    for row in found.values():
        assert any(row["name"] in line and f"{100 * row['mean']['accuracy']:.1f}" in line for line in printed.splitlines())


def test_extra_parameters_are_what_the_model_holds_besides_one_encoder(compare) -> None:
    results = compare(["Average", "SMILE"], scale=1.0)
    found = {row["name"]: row for row in results["rows"]}
    width, tasks, gate = 32, 3, 16
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    block = sum(tasks * (32 * (out + into) + gate * into + out) for out, into in shapes)  # factors, gates, biases
    assert found["SMILE"]["extra_parameters"] == 2 * block
    assert found["SMILE"]["scale"] is None, "no coefficient makes a difference"
    assert found["Average"]["extra_parameters"] == 0
    assert found["experts"]["extra_parameters"] == 2 * results["parameters"]


def test_a_second_run_measures_nothing(
    compare, merges: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = compare(["TSVM", "TaskArithmetic"], scale="search")
    assert merges == ["TSVM", "TaskArithmetic"]

    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    for name in ("merge", "accuracy"):
        monkeypatch.setattr(Workbench, name, refuse)
    monkeypatch.setattr("mergekit_vision.compare.expert_analysis", refuse)
    assert "from an earlier run" not in capsys.readouterr().out
    assert compare(["TSVM", "TaskArithmetic"], scale="search") == first
    assert capsys.readouterr().out.count("from an earlier run") == 2


def test_another_method_costs_one_method(compare, merges: list[str]) -> None:
    compare("TaskArithmetic")
    both = compare("TaskArithmetic, Average")
    assert merges == ["TaskArithmetic", "Average"]
    assert {row["name"] for row in both["rows"]} == {"zero-shot", "TaskArithmetic", "Average", "experts"}


def test_another_setting_is_another_result(compare, merges: list[str]) -> None:
    settings = [
        ({"scale": 1.0}, {}),
        ({"scale": 0.7}, {}),
        ({"scale": 1.0}, {"proxies": Proxies(n=9)}),
        ({"scale": 1.0, "experts": ["grays", "colors"]}, {}),
        ({"scale": 1.0}, {"tasks": ["grays"]}),
    ]
    for model, data in settings * 2:
        compare(["Average"], data, **model)
    assert len(merges) == len(settings)


def test_an_interrupted_run_keeps_what_was_finished(
    command, tmp_path: Path, merges: list[str], monkeypatch: pytest.MonkeyPatch
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


def test_a_spoiled_entry_is_measured_again(compare, cache: Path, merges: list[str]) -> None:
    first = compare("Average")
    for path in (cache / "comparisons").iterdir():
        path.write_text(path.read_text()[:20])
    second = compare("Average")
    assert merges == ["Average", "Average"]
    assert [row["tasks"] for row in second["rows"]] == [row["tasks"] for row in first["rows"]]


def test_two_processes_find_what_one_finds(compare, tmp_path: Path, tiny_suite: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MERGEKIT_VISION_CACHE": str(tmp_path / "cache")}
    options = ["--mergers", "SMILE", "--model.scale", "merger", "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    arguments = [sys.executable, "-m", "mergekit_vision", "compare", "--suite", str(tiny_suite), *options]
    process = subprocess.run(
        [*arguments, "--output", str(tmp_path / "two")], capture_output=True, text=True, env=environment, check=False, timeout=300
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("┏") == 1, "only the first process reports"
    two = rows(tmp_path / "two")
    for row in compare("SMILE", scale="merger")["rows"]:
        for key in ("tasks", "routing", "extra_parameters"):
            assert two[row["name"]].get(key) == row.get(key), (row["name"], key)


def test_a_method_that_refuses_the_suite(tmp_path: Path, tiny_suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_vision.registry.mergers", lambda: {"Demanding": Demanding, "Shy": Shy, "TA": TaskArithmetic})

    def run(mergers: list[str] | str) -> None:
        trainer = Trainer(default_root_dir=str(tmp_path), accelerator="cpu")
        trainer.compare(MergedCLIP(), VisionTasks(str(tiny_suite)), mergers)

    run("all")
    assert results(tmp_path)["left_out"] == {"Shy": "not this one"}
    assert "not this one" in (tmp_path / "report.html").read_text()
    with pytest.raises(InputError, match="not this one"):
        run([f"{__name__}.Shy"])


def test_a_model_is_as_it_was_afterwards(tmp_path: Path, tiny_suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_vision.reports.html.write_comparison", lambda *_: None)
    model, data = MergedCLIP(), VisionTasks(str(tiny_suite))
    trainer = Trainer(default_root_dir=str(tmp_path), accelerator="cpu")
    trainer.compare(model, data, ["Average"])
    with pytest.raises(InputError, match="give one of"):
        trainer.test(model, data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mergers", "TSMV"), "Did you mean TSVM"),
        (("--mergers", "[]"), "at least one"),
        (("--mergers", f"[{__name__}.Demanding]"), "no default for gain"),
        (("--model.merger", "TSVM"), "from --mergers"),
        (("--model.scale", "serch"), "--model.scale"),
    ],
)
def test_mistakes(command, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("compare", *options) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("mergekit-vision: error: ")


def test_every_registered_method_is_chosen() -> None:
    from mergekit_vision.registry import mergers

    assert {name: type(merger) for name, merger in default_mergers("all").items()} == mergers()


def test_conditions_of_a_method_are_its_parameters_and_those_of_its_base() -> None:
    known = [TIES(), TIES(density=0.3), ESMPP(), ESMPP(base=TIES()), ESMPP(base=TIES(density=0.3))]
    assert len({tuple(of_merger(merger) or ()) for merger in known}) == len(known)
    assert of_merger(TIES()) == of_merger(TIES())
