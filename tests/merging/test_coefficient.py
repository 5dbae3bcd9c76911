"""The choice of the scaling coefficient, on the tiny suite."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import TASKS

from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.data.loader import PixelLoader
from mergekit_vision.errors import InputError
from mergekit_vision.evaluation.evaluator import Evaluator
from mergekit_vision.merger import Merged, merged_weights
from mergekit_vision.merging.coefficient import Curve, Scale, ScaleChoice, search_coefficient
from mergekit_vision.merging.scaling import ScaleSearch
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.plugins.smile import SMILE
from mergekit_vision.plugins.task_arithmetic import TaskArithmetic

COARSE = ScaleSearch(halvings=0)
OWN = dict.fromkeys(TASKS, 0.5)


@pytest.fixture
def merged(bench: Workbench) -> Merged:
    return bench.merge(TaskArithmetic(), bench.evaluator.data.suite.experts)


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled with the task of every evaluation."""
    tasks: list[str] = []
    accuracies = Evaluator.accuracies

    def counting(self: Evaluator, models: Sequence[Evaluator], task: str, split: str) -> list[float]:
        assert split == "val"
        tasks.append(task)
        return accuracies(self, models, task, split)

    monkeypatch.setattr(Evaluator, "accuracies", counting)
    return tasks


def choice(bench: Workbench, scale: Scale, search: ScaleSearch = COARSE) -> ScaleChoice:
    return ScaleChoice(bench, list(TASKS), scale, search)


def check_curve(curve: Curve, bench: Workbench, merged: Merged, own: dict[str, float]) -> None:
    """Every point is what evaluating the merged model at that coefficient gives; the best is first."""
    assert len({point["coefficient"] for point in curve}) == len(curve) > 2
    for point in curve:
        weights = merged_weights(bench.base, merged, point["coefficient"])
        with bench.evaluator.with_model(weights, merged.routed, list(own)) as evaluator:
            found = {task: evaluator.accuracy(task, "val") for task in own}
        assert point["accuracy"] == sum(found.values()) / len(found)
        assert point["normalized"] == sum(found[task] / own[task] for task in own) / len(own)
    assert curve[0]["normalized"] == max(point["normalized"] for point in curve)


def test_a_search_measures_the_merged_model_at_every_coefficient(bench: Workbench, merged: Merged) -> None:
    own = {task: bench.evaluator.expert_accuracy(task, "val") for task in TASKS}
    curve = search_coefficient(bench, merged, ScaleSearch(halvings=1), own)
    check_curve(curve, bench, merged, own)
    assert len({point["accuracy"] for point in curve}) > 1, "the coefficient makes a difference"
    assert all(torch.equal(value, bench.base[key]) for key, value in bench.evaluator.encoder.weights().items())


def test_a_search_runs_the_model_with_its_routed_experts(bench: Workbench, merged: Merged) -> None:
    routed = bench.merge(SMILE(rank=4), bench.evaluator.data.suite.experts).routed
    dynamic = replace(merged, routed=routed)
    curve = search_coefficient(bench, dynamic, COARSE, OWN)
    check_curve(curve, bench, dynamic, OWN)
    points = {point["coefficient"]: point for point in search_coefficient(bench, merged, COARSE, OWN)}
    shared = [point for point in curve if point["coefficient"] in points]
    assert any(point != points[point["coefficient"]] for point in shared), "the routed experts make a difference"
    assert bench.evaluator.encoder.routing is None


def test_what_was_searched_once_is_not_searched_again(bench: Workbench, merged: Merged, evaluated: list[str]) -> None:
    def evaluations(merged: Merged, search: ScaleSearch = COARSE, own: dict[str, float] = OWN) -> int:
        evaluated.clear()
        curve = search_coefficient(bench, merged, search, own)
        assert curve[0]["normalized"] == max(point["normalized"] for point in curve)
        assert len(evaluated) in (0, len(own) * len(curve))
        return len(evaluated)

    same = Merged({key: value.clone() for key, value in merged.update.items()}, scale=0.1)
    assert evaluations(merged)
    assert not evaluations(same), "its own coefficient is not among what is searched"
    assert evaluations(Merged({key: 2 * value for key, value in merged.update.items()}))
    assert evaluations(merged, search=ScaleSearch(halvings=1))
    assert evaluations(merged, own={**OWN, "grays": 0.6})
    assert evaluations(merged, own={"grays": 0.5})
    assert evaluations(Merged(merged.update, fixed=frozenset(["visual.proj"])))
    assert not evaluations(merged)


def test_a_number_and_the_methods_own_need_no_evaluation(bench: Workbench, merged: Merged, evaluated: list[str]) -> None:
    assert choice(bench, 0.7)(merged) == 0.7
    assert choice(bench, "merger")(merged) == merged.scale == 0.3
    assert evaluated == []


def test_a_search_is_kept_and_says_what_it_chose(bench: Workbench, merged: Merged, caplog: pytest.LogCaptureFixture) -> None:
    searching = choice(bench, "search")
    with caplog.at_level("INFO", logger="mergekit_vision"):
        found = searching(merged)
    assert found == searching.curve[0]["coefficient"]
    assert searching.seconds > 0
    own = {task: bench.evaluator.expert_accuracy(task, "val") for task in TASKS}
    assert searching.curve == search_coefficient(bench, merged, COARSE, own)
    messages = [record.getMessage() for record in caplog.records]
    assert messages[-1] == f"chosen: coefficient {found:.4g}"
    assert all(any(line.startswith(f"coefficient {p['coefficient']:.4g}: ") for line in messages) for p in searching.curve)


def test_a_coefficient_that_changes_nothing_is_not_searched(
    bench: Workbench, merged: Merged, evaluated: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    unscalable = Merged(merged.update, scale=0.9, fixed=frozenset(merged.update))
    with caplog.at_level("INFO", logger="mergekit_vision"):
        assert choice(bench, "search")(unscalable) == 0.9
        assert choice(bench, 0.5)(unscalable) == 0.9
    assert [record.getMessage() for record in caplog.records] == ["this method has no scaling coefficient to set or search"] * 2
    caplog.clear()
    with caplog.at_level("INFO", logger="mergekit_vision"):
        assert choice(bench, "merger")(unscalable) == 0.9
        used = choice(bench, 0.5)  # a method that builds on a scaled model asks for that one's coefficient
        used(merged)
        used(unscalable)
    assert caplog.records == []
    assert evaluated == []


@pytest.mark.parametrize("routed", [False, True])
def test_where_images_do_not_stay_decoded_two_coefficients_share_a_pass(
    bench: Workbench, merged: Merged, tiny_suite: Path, routed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if routed:
        merged = replace(merged, routed=bench.merge(SMILE(rank=4), bench.evaluator.data.suite.experts).routed)
    search = ScaleSearch(halvings=1)
    curve = search_coefficient(bench, merged, search, OWN)
    forgetful = Workbench.open(VisionTasks(str(tiny_suite), cache_mb=0), bench.evaluator.runtime)
    passes: list[PixelLoader] = []
    decoded = PixelLoader._decoded
    monkeypatch.setattr(PixelLoader, "_decoded", lambda self: passes.append(self) or decoded(self))
    assert search_coefficient(forgetful, merged, search, OWN) == curve
    assert len(TASKS) <= len(passes) <= len(TASKS) * (len(curve) + 2) / 2
    assert all(torch.equal(value, bench.base[key]) for key, value in forgetful.evaluator.encoder.weights().items())


def test_experts_are_asked_for_their_own_accuracy_once(bench: Workbench, merged: Merged, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    accuracy = Evaluator.expert_accuracy
    monkeypatch.setattr(
        Evaluator, "expert_accuracy", lambda self, task, split: asked.append((task, split)) or accuracy(self, task, split)
    )
    first, second = choice(bench, "search"), choice(bench.on(bench.evaluator.data), "search", ScaleSearch(high=0.5, halvings=0))
    first(merged)
    second(merged)
    assert first.curve != second.curve
    assert asked == [(task, "val") for task in TASKS]


def test_an_expert_that_knows_nothing_is_named(bench: Workbench, merged: Merged, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy = Evaluator.expert_accuracy
    monkeypatch.setattr(
        Evaluator, "expert_accuracy", lambda self, task, split: 0.0 if task == "grays" else accuracy(self, task, split)
    )
    with pytest.raises(InputError, match="the expert of grays gets no val image right"):
        choice(bench, "search")(merged)
