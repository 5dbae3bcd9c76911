"""The `tune` command: combinations judged by the experts, without labels, and the best as a configuration."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import SIZES, TASKS

from mergekit_vision import InputError, Merged, MergeInputs, Merger, Proxies, VisionTasks
from mergekit_vision.cli.main import main
from mergekit_vision.evaluation.evaluator import Evaluator
from mergekit_vision.merging.agreement import ExpertTeachers
from mergekit_vision.merging.recipe import Recipe
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.plugins.esmpp import ESMPP
from mergekit_vision.plugins.tall import TALLMasks
from mergekit_vision.plugins.ties import TIES
from mergekit_vision.runs.tuning import Tuning

Command = Callable[..., int]
GRID = ("-m", "TIES", "--merger.count_frozen", "1", "--grid", "{density: [0.1, 0.5]}")
COARSE = ("--model.search.high", "0.5", "--model.search.halvings", "0", "-o", "out")


@pytest.fixture
def command(tiny_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setattr(sys, "argv", ["mergekit-vision"])
    monkeypatch.setattr(Evaluator, "accuracy", lambda *_: pytest.fail("a label was read"))
    monkeypatch.chdir(tmp_path)

    def run(name: str, *options: str) -> int:
        return main([name, "--suite", str(tiny_suite), "--trainer.accelerator", "cpu", *options])

    return run


def results(place: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((place / "results.json").read_text())
    return content


def test_what_is_no_merge_is_not_tuned() -> None:
    with pytest.raises(InputError, match="TALLMasks is no merge"):
        Tuning(Recipe(), TALLMasks(), {"threshold": [0.2, 0.4]})


def test_an_oracle_of_routing_is_told_the_task(command: Command, tmp_path: Path) -> None:
    options = ("-m", "SMILE", "--merger.top_k", "1", "--grid", "{rank: [1, 8]}", *COARSE)
    assert command("tune", "--route", "oracle", *options) == 0
    oracle = results(tmp_path / "out")["rows"]
    assert command("tune", *options) == 0
    assert {row["distance"] for row in oracle} != {row["distance"] for row in results(tmp_path / "out")["rows"]}


def test_the_best_of_all_combinations_is_merged_from_its_file(
    command: Command, bench: Workbench, tmp_path: Path, merges: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("tune", *GRID, *COARSE) == 0
    rows = results(tmp_path / "out")["rows"]
    assert {row["values"]["density"] for row in rows} == {0.1, 0.5}
    assert [row["distance"] for row in rows] == sorted(row["distance"] for row in rows)
    assert len({row["distance"] for row in rows}) > 1, "nothing to choose: the test tests nothing"
    teachers = ExpertTeachers(bench.evaluator, list(TASKS))
    for row in rows:
        model = Recipe(row["scale"]).merge(bench, TIES(**row["values"], count_frozen=1))
        with bench.evaluator.with_model(model.weights) as evaluator:
            assert teachers.agreement(evaluator).distance == pytest.approx(row["distance"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.yaml", "results.json", "tuning.png", "winner.yaml"}
    assert rows[0]["name"] in capsys.readouterr().out
    before = len(merges)
    assert command("tune", *GRID, *COARSE) == 0
    assert len(merges) == before, "known from the first run"
    assert results(tmp_path / "out")["rows"] == rows
    assert command("merge", "--config", "out/winner.yaml", "-o", "merged") == 0
    record = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert record["merger"] == rows[0]["merger"]
    assert record["scale"] == rows[0]["scale"]


def test_an_interrupted_run_goes_on_where_it_was(
    command: Command, tmp_path: Path, merges: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = TIES.merge

    def interrupted(self: TIES, inputs: Any) -> Any:
        if self.density == 0.5:
            raise KeyboardInterrupt
        return merge(self, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(TIES, "merge", interrupted)
        assert command("tune", *GRID, *COARSE) == 130
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    merges.clear()
    assert command("tune", *GRID, *COARSE) == 0
    assert len(merges) == 1


@pytest.mark.parametrize(
    ("method", "options", "halved"),
    [
        ("ESM", ["--grid", "{rank: [2]}"], True),
        ("ESM", ["--grid", "{rank: [2]}", "--merger.directions", "svd"], False),
        ("SMILE", ["--grid", "{rule: [mass, sim]}", "--merger.rank", "2", "--merger.gate_rank", "1"], True),
        ("SMILE", ["--grid", "{rule: [mass]}", "--merger.rank", "2", "--merger.gate_rank", "1"], False),
        ("Trim", ["--grid", "{density: [0.1]}", "--merger.base", "ESM"], True),
    ],
)
def test_a_method_is_judged_by_images_that_it_has_not_seen(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, options: list[str], halved: bool
) -> None:
    seen, judged = list[VisionTasks](), list[VisionTasks]()
    merge, teachers = Workbench.merge, ExpertTeachers.__init__

    def merging(self: Workbench, *arguments: Any) -> Any:
        seen.append(self.evaluator.data)
        return merge(self, *arguments)

    def judging(self: ExpertTeachers, evaluator: Evaluator, *arguments: Any) -> None:
        judged.append(evaluator.data)
        teachers(self, evaluator, *arguments)

    monkeypatch.setattr(Workbench, "merge", merging)
    monkeypatch.setattr(ExpertTeachers, "__init__", judging)
    for asked, there_are in ((9, 9), (80, SIZES["val"])):
        seen.clear()
        judged.clear()
        assert command("tune", "-m", method, *options, "--proxies", str(asked), *COARSE) == 0
        known, new = images(seen), images(judged)
        assert len(known) == (there_are // 2 if halved else there_are)
        assert len(known | new) == there_are
        assert known.isdisjoint(new) == halved
        assert yaml.safe_load((tmp_path / "out" / "winner.yaml").read_text())["data"]["proxies"] == asdict(Proxies(n=asked))


def images(used: list[VisionTasks]) -> set[int]:
    """The proxy images of a task, the same in all of the data."""
    (found,) = {tuple(data._images.proxy_images("grays")[1]) for data in used}
    return set(found)


def test_what_has_no_coefficient_is_judged_too(command: Command, tmp_path: Path) -> None:
    assert command("tune", "-m", "CART", "--grid", "{gain: [0, 1]}", *COARSE) == 0
    assert len({row["distance"] for row in results(tmp_path / "out")["rows"]}) == 2
    assert yaml.safe_load((tmp_path / "out" / "winner.yaml").read_text())["model"]["scale"] == "merger"


@pytest.mark.parametrize(
    ("method", "grid", "message"),
    [
        ("ESM", "{rnak: [4]}", "unknown key `rnak` (did you mean `rank`?); ESM takes"),
        ("ESM", "{rank: [4, x]}", "rank: must be a whole number"),
        ("ESM", "{rank: [0]}", "ESM: rank is 0"),
        ("ESM", "{rank: 4}", "--grid"),
        ("ESM", "{rank: []}", "rank has no values"),
        ("ESM", "{rank: [4, 4]}", "rank has a value twice"),
        ("ESM", "{}", "--grid is empty"),
        ("ESM", "{rank.x: [1]}", "rank.x: rank is no method that has parameters"),
        ("ESMPP", "{base.rank: [1]}", "base.rank: base is no method that has parameters"),
    ],
)
def test_faults_of_a_grid_are_told_before_any_work(
    command: Command, merges: list[str], capsys: pytest.CaptureFixture[str], method: str, grid: str, message: str
) -> None:
    assert command("tune", "-m", method, "--grid", grid) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.splitlines()) == 1
    assert merges == []


class Hidden(Merger):
    """Keeps its parameter under another name."""

    def __init__(self, gain: float = 1.0) -> None:
        self._gain = gain

    def merge(self, inputs: MergeInputs) -> Merged:
        return Merged({})


def test_a_method_whose_parameters_cannot_be_told_is_refused() -> None:
    with pytest.raises(InputError, match=r"grid: Hidden does not keep .* gain; its constructor must set self\.gain"):
        Tuning(Recipe(), Hidden(), {"gain": [0, 1]})


def test_parameters_of_the_base_are_reached() -> None:
    rows = Tuning(Recipe(), ESMPP(base=TIES(), rank=2), {"base.density": [0.1, 0.3], "rank": [4, 5]}).rows
    expected: list[Merger] = [ESMPP(base=TIES(density=density), rank=rank) for density in (0.1, 0.3) for rank in (4, 5)]
    assert [row.merger for row in rows] == expected
    assert [row.name for row in rows][:2] == ["base.density 0.1, rank 4", "base.density 0.1, rank 5"]
