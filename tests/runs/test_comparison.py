"""Many methods on a tiny suite: their numbers, what is remembered, and what is refused."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning
import pytest
import yaml
from spoiled import spoil

from mergekit_vision import InputError, MergedCLIP, MergeInputs, Merger, Proxies, Trainer, VisionTasks
from mergekit_vision.evaluation.evaluator import Evaluator
from mergekit_vision.merger import Merged
from mergekit_vision.merging.recipe import Recipe
from mergekit_vision.merging.scaling import ScaleSearch
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.plugins.emr import EMR
from mergekit_vision.plugins.esmpp import ESMPP
from mergekit_vision.plugins.task_arithmetic import TaskArithmetic
from mergekit_vision.registry import default_mergers, mergers
from mergekit_vision.runs.comparison import Comparison
from mergekit_vision.runs.variants import Variant

Compare = Callable[..., dict[str, Any]]


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
def compare(tiny_suite: Path, tmp_path: Path) -> Compare:
    """Compare methods with any trainer; gives the results as JSON keeps them."""

    def run(mergers: str | Sequence[str], data: dict[str, Any] | None = None, **recipe: Any) -> dict[str, Any]:
        comparison = Comparison(Recipe(**recipe), default_mergers(mergers))
        trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
        trainer.predict(comparison, VisionTasks(str(tiny_suite), **(data or {})), return_predictions=False)
        found: dict[str, Any] = json.loads(json.dumps(comparison.results))
        return found

    return run


def test_rows_are_what_evaluating_each_method_finds(compare: Compare, tiny_suite: Path, tmp_path: Path) -> None:
    search = ScaleSearch(halvings=0)
    found = {row["name"]: row for row in compare(["TaskArithmetic", "ESMPP"], scale="search", search=search)["rows"]}
    assert set(found) == {"zero-shot", "TaskArithmetic", "ESMPP", "experts"}

    def alone(model: MergedCLIP) -> dict[str, Any]:
        Trainer(default_root_dir=str(tmp_path / "alone"), accelerator="cpu").test(model, VisionTasks(str(tiny_suite)))
        results: dict[str, Any] = json.loads((tmp_path / "alone" / "results.json").read_text())
        return results

    for merger in (TaskArithmetic(), ESMPP()):
        row, results = found[type(merger).__name__], alone(MergedCLIP(merger, scale="search", search=search))
        for key in ("tasks", "mean", "scale", "search", "merger"):
            assert row[key] == results[key], key
        assert row["routing"] == results.get("routing")
    assert found["zero-shot"]["tasks"] == alone(MergedCLIP(TaskArithmetic(), scale=0.0))["tasks"]
    assert {task["normalized"] for task in found["experts"]["tasks"].values()} == {1.0}


def test_results_say_what_they_are_and_of_what(compare: Compare, bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    results = compare("Average", {"tasks": ["grays"]}, scale=0.5, experts=("grays", "colors"))
    assert (results["kind"], results["schema"]) == ("comparison", 1)
    assert results["layers"] == {
        linear.name: {"block": linear.block, "kind": linear.kind} for linear in bench.evaluator.encoder.linears
    }
    assert results["energy"].keys() <= results["layers"].keys()
    assert results["tasks"] == {"grays": {"images": 41, "classes": 5}}
    assert list(results["experts"]) == ["grays", "colors"]
    assert results["similarity"]["tasks"] == ["grays", "colors"]
    assert results["rows"][-1]["extra_parameters"] == results["parameters"], "one expert more, though one task is evaluated"
    assert (results["scale"], results["search"], results["seed"], results["processes"]) == (0.5, None, 7, 1)
    assert results["parameters"] == sum(value.numel() for value in bench.base.values())
    assert [row["kind"] for row in results["rows"]] == ["backbone", "static", "experts"]
    assert not any(Path(file).is_absolute() for file in results["experts"].values())


def test_extra_parameters_are_what_the_model_holds_besides_one_encoder(compare: Compare) -> None:
    results = compare(["Average", "SMILE"], scale=1.0)
    found = {row["name"]: row for row in results["rows"]}
    width, tasks, gate = 32, 3, 16
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    block = sum(tasks * (32 * (out + into) + gate * into + out) for out, into in shapes)  # factors, gates, biases
    assert found["SMILE"]["extra_parameters"] == 2 * block
    assert found["SMILE"]["scale"] is None, "no coefficient makes a difference"
    assert found["Average"]["extra_parameters"] == 0
    assert found["experts"]["extra_parameters"] == 2 * results["parameters"]


def test_oracles_lie_apart_and_only_a_comparison_runs_them(compare: Compare, tiny_suite: Path, tmp_path: Path) -> None:
    rows = compare(["TSVC", "ESMPP", "EMR", "Average"], route="oracle")["rows"]
    assert [(row["name"], row["kind"]) for row in rows[:2]] == [("zero-shot", "backbone"), ("Average", "static")]
    assert rows[-1]["kind"] == "experts"
    oracles = rows[2:-1]
    assert {(row["name"], row["kind"]) for row in oracles} == {("TSVC", "oracle"), ("ESMPP", "oracle"), ("EMR", "oracle")}
    sizes = [row["bytes"]["task"] for row in oracles]
    assert sizes == sorted(sizes)
    assert sizes[0] > 0
    assert rows[1]["bytes"] == {"task": 0, "shared": 0}
    for row in oracles:
        if row["name"] != "ESMPP":
            assert row["extra_parameters"] == (row["bytes"]["shared"] + len(row["tasks"]) * row["bytes"]["task"]) // 4
    with pytest.raises(InputError, match="EMR is no merge: it must be told each image's task"):
        Trainer(default_root_dir=str(tmp_path / "no"), accelerator="cpu").merge(MergedCLIP(EMR()), VisionTasks(str(tiny_suite)))
    assert not (tmp_path / "no").exists()


def test_a_second_run_measures_nothing(
    compare: Compare, merges: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="mergekit_vision"):
        first = compare(["TSVM", "TaskArithmetic"], scale="search")
    assert merges == ["TSVM", "TaskArithmetic"]
    assert "from an earlier run" not in caplog.text

    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Workbench, "merge", refuse)
    monkeypatch.setattr(Evaluator, "accuracy", refuse)
    monkeypatch.setattr("mergekit_vision.runs.comparison.expert_analysis", refuse)
    with caplog.at_level("INFO", logger="mergekit_vision"):
        assert compare(["TSVM", "TaskArithmetic"], scale="search") == first
    assert caplog.text.count("from an earlier run") == 2


def test_another_method_costs_one_method(compare: Compare, merges: list[str]) -> None:
    compare("TaskArithmetic")
    both = compare("TaskArithmetic, Average")
    assert merges == ["TaskArithmetic", "Average"]
    assert {row["name"] for row in both["rows"]} == {"zero-shot", "TaskArithmetic", "Average", "experts"}


def test_another_setting_is_another_result(compare: Compare, merges: list[str]) -> None:
    settings = [
        ({"scale": 1.0}, {}),
        ({"scale": 0.7}, {}),
        ({"scale": 1.0}, {"proxies": Proxies(n=9)}),
        ({"scale": 1.0, "experts": ("grays", "colors")}, {}),
        ({"scale": 1.0}, {"tasks": ["grays"]}),
    ]
    for model, data in settings * 2:
        compare(["Average"], data, **model)
    assert len(merges) == len(settings)


def test_a_spoiled_entry_is_measured_again(compare: Compare, cache: Path, merges: list[str]) -> None:
    first = compare("Average")
    for path in (cache / "comparisons").iterdir():
        path.write_text(path.read_text()[:20])
    second = compare("Average")
    assert merges == ["Average", "Average"]
    assert [row["tasks"] for row in second["rows"]] == [row["tasks"] for row in first["rows"]]


@pytest.mark.parametrize("content", [b"{}", b'{"accuracy": {"colors": 7.0}}', b"[]"])
def test_an_entry_that_does_not_fit_is_measured_again(compare: Compare, cache: Path, merges: list[str], content: bytes) -> None:
    first = compare("Average")
    spoil(cache / "comparisons", content)
    assert [row["tasks"] for row in compare("Average")["rows"]] == [row["tasks"] for row in first["rows"]]
    assert merges == ["Average", "Average"]


def test_a_method_that_refuses_the_suite_is_left_out_of_all(
    tmp_path: Path, tiny_suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergekit_vision.registry.mergers", lambda: {"Demanding": Demanding, "Shy": Shy, "TA": TaskArithmetic})

    def run(mergers: list[str] | str) -> None:
        trainer = Trainer(default_root_dir=str(tmp_path), accelerator="cpu")
        trainer.compare(MergedCLIP(), VisionTasks(str(tiny_suite)), mergers)

    run("all")
    assert json.loads((tmp_path / "results.json").read_text())["left_out"] == {"Shy": "not this one"}
    assert "not this one" in (tmp_path / "report.html").read_text()
    with pytest.raises(InputError, match="not this one"):
        run([f"{__name__}.Shy"])


def test_proxy_images_that_a_row_needs_are_looked_for_first(tmp_path: Path, tiny_suite: Path, merges: list[str]) -> None:
    content = yaml.safe_load(tiny_suite.read_text())
    del content["tasks"]["grays"]["data"]["val"]
    suite = tiny_suite.with_name("without_val.yaml")
    suite.write_text(yaml.safe_dump(content))
    trainer = Trainer(default_root_dir=str(tmp_path), accelerator="cpu")
    with pytest.raises(InputError, match=r"tasks\.grays\.data"):
        trainer.compare(MergedCLIP(), VisionTasks(str(suite)), ["Average", "ESM"])
    with pytest.raises(InputError, match=r"tasks\.grays\.data"):
        trainer.compare(MergedCLIP(scale="agreement"), VisionTasks(str(suite)), "all")
    assert merges == []


def test_an_unmerged_task_cannot_be_routed_to_its_expert(tmp_path: Path, tiny_suite: Path, merges: list[str]) -> None:
    """In a comparison of all methods too, as images that cannot be routed end it."""
    data, model = VisionTasks(str(tiny_suite)), MergedCLIP(experts=["colors", "grays"], route="oracle")
    for chosen in ("all", ["Average", "ESMPP"]):
        with pytest.raises(InputError, match=r"^`model\.route` oracle: the experts of stripes are not merged"):
            Trainer(default_root_dir=str(tmp_path), accelerator="cpu").compare(model, data, chosen)
    rows = [Variant("plain", ESMPP(rank=2)), Variant("told", ESMPP(rank=2), route="oracle")]
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    with pytest.raises(InputError, match=r"^variant told: `model\.route` oracle: the experts of stripes are not merged"):
        trainer.predict(Comparison(Recipe(experts=("colors", "grays")), {}, variants=rows), data)
    assert merges == []
    told = [Variant("told", ESMPP(rank=2), route="oracle", tasks=2)]
    trainer.predict(Comparison(Recipe(experts=("stripes",)), {}, variants=told), data)
    assert merges == ["ESMPP"], "a row's own tasks are those that it merges"


def test_a_model_is_as_it_was_afterwards(tmp_path: Path, tiny_suite: Path) -> None:
    model, data = MergedCLIP(), VisionTasks(str(tiny_suite))
    trainer = Trainer(default_root_dir=str(tmp_path), accelerator="cpu")
    trainer.compare(model, data, ["Average"])
    with pytest.raises(InputError, match="give one of"):
        trainer.test(model, data)


@pytest.mark.parametrize(
    ("mergers", "message"),
    [
        ("TSMV", "Did you mean TSVM"),
        ([], "`mergers`: name at least one method"),
        ([f"{__name__}.Demanding"], "Demanding: has no default for gain"),
    ],
)
def test_methods_that_cannot_be_compared(compare: Compare, mergers: str | list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare(mergers)


def test_compare_takes_no_method_of_the_model(tmp_path: Path, tiny_suite: Path) -> None:
    for model in (MergedCLIP(TaskArithmetic()), MergedCLIP(merged=str(tmp_path))):
        with pytest.raises(InputError, match="neither `merger` nor `merged`") as caught:
            Trainer(default_root_dir=str(tmp_path)).compare(model, VisionTasks(str(tiny_suite)))
        assert caught.value.of == "model"


def test_every_registered_method_is_chosen() -> None:
    assert {name: type(merger) for name, merger in default_mergers("all").items()} == mergers()
