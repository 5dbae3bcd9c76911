"""Fidelity on real experts and real images: the accuracies that the published code reaches on the zoo."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_vision.data.checks import Needs
from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.encoders.routed import Route
from mergekit_vision.evaluation.evaluator import Runtime
from mergekit_vision.merger import Merged, Merger, merged_weights
from mergekit_vision.merging.coefficient import search_coefficient
from mergekit_vision.merging.scaling import ScaleSearch
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.plugins.esmpp import ESMPP
from mergekit_vision.plugins.task_arithmetic import TaskArithmetic
from mergekit_vision.registry import mergers

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "average": ("Average", {}),
    "task_arithmetic": ("TaskArithmetic", {}),
    "ties_mean": ("TIES", {"density": 0.2}),
    "ties_sum": ("TIES", {"density": 0.2, "aggregate": "sum"}),
    "tsv_m": ("TSVM", {}),
    "esm": ("ESM", {}),
}


class Zoo:
    """The zoo on a workbench; a method is merged once for all tests."""

    def __init__(self, path: Path) -> None:
        data = VisionTasks(str(path / "suite.yaml"))
        data.check(Needs({"val", "test"}, proxies=True))
        self.bench = Workbench.open(data, Runtime(torch.device("cpu")))
        self.experts = data.suite.experts
        self.expected = json.loads((path / "expected.json").read_text())
        self._merged: dict[str, Merged] = {}

    def merged(self, row: str) -> Merged:
        if row not in self._merged:
            name, arguments = METHODS[row]
            merger: Merger = mergers()[name](**arguments)
            self._merged[row] = self.bench.merge(merger, self.experts)
        return self._merged[row]

    def accuracies(
        self, split: str, merged: Merged | None = None, scale: float | None = None, route: Route = "router"
    ) -> list[float]:
        """Accuracy of a model on every task, the backbone's where there is none."""
        model = Merged({}) if merged is None else merged
        weights = merged_weights(self.bench.base, model, scale)
        with self.bench.evaluator.with_model(weights, model.routed, list(self.experts), route) as evaluator:
            return [100 * evaluator.accuracy(task, split) for task in self.experts]

    def mean(self, row: str, split: str, scale: float) -> float:
        return sum(self.accuracies(split, self.merged(row), scale)) / len(self.experts)

    def routed(self, merger: Merger, scale: float, split: str, route: Route) -> float:
        """Mean accuracy of a dynamic model whose base is used at ``scale``."""
        row = f"{merger} at {scale}"
        if row not in self._merged:
            self._merged[row] = self.bench.merge(merger, self.experts, lambda _: scale)
        return sum(self.accuracies(split, self._merged[row], route=route)) / len(self.experts)


@pytest.fixture(scope="module")
def real(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zoo]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGEKIT_VISION_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Zoo(zoo)


def test_zero_shot_backbone(real: Zoo) -> None:
    for task, value in zip(real.experts, real.accuracies("test"), strict=True):
        assert value == pytest.approx(real.expected["zero_shot"][task], abs=0.1), task


def test_single_experts(real: Zoo) -> None:
    for task in real.experts:
        value = 100 * real.bench.evaluator.expert_accuracy(task, "test")
        assert value == pytest.approx(real.expected["single"][task], abs=0.1), task


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=[pytest.mark.slow] if row in ("average", "ties_sum") else []) for row in METHODS]
)
def test_test_accuracy_at_the_published_coefficient(real: Zoo, row: str) -> None:
    expected = real.expected[row]
    assert real.mean(row, "test", expected["alpha"]) == pytest.approx(expected["test"]["avg"], abs=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in METHODS if row != "average"])
def test_whole_validation_curve(real: Zoo, row: str) -> None:
    curve = {float(c): value for c, value in real.expected[row]["val"].items()}
    ours = {c: real.mean(row, "val", c) for c in curve}
    assert ours == pytest.approx(curve, abs=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("row", METHODS)
def test_searched_coefficient(real: Zoo, row: str) -> None:
    own = {task: real.bench.evaluator.expert_accuracy(task, "val") for task in real.experts}
    chosen = search_coefficient(real.bench, real.merged(row), ScaleSearch(), own)[0]["coefficient"]
    assert real.mean(row, "test", chosen) == pytest.approx(real.expected[row]["test"]["avg"], abs=0.5)


@pytest.mark.parametrize("mode", ["router", "oracle"])
@pytest.mark.parametrize(
    ("base", "rank"),
    [("esm", 32), *(pytest.param(base, rank, marks=pytest.mark.slow) for base, rank in (("esm", 8), ("base", 8), ("base", 32)))],
)
def test_esmpp_by_the_published_rule_and_by_the_oracle(real: Zoo, base: str, rank: int, mode: Route) -> None:
    merger = ESMPP(rank=rank) if base == "esm" else ESMPP(base=TaskArithmetic(), rank=rank)
    scale = real.expected["esm"]["alpha"] if base == "esm" else 0.0
    expected = real.expected[f"esmpp_on_{base}_r{rank}"]["test" if mode == "router" else "oracle"]["avg"]
    assert real.routed(merger, scale, "test", mode) == pytest.approx(expected, abs=0.5)
