"""Fidelity on real experts and real images: the accuracies that the published code reaches on the zoo."""

import copy
import json
from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor, nn

from mergekit_vision.checkpoints import open_weights
from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.encoders.backbone import describe_backbone, load_clip
from mergekit_vision.encoders.heads import build_heads
from mergekit_vision.encoders.vision import VisionEncoder
from mergekit_vision.evaluation.metric import measure
from mergekit_vision.merger import Merged, Merger, merged_weights
from mergekit_vision.merging.scaling import ScaleSearch
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.plugins.esmpp import ESMPP
from mergekit_vision.plugins.task_arithmetic import TaskArithmetic
from mergekit_vision.registry import mergers

CPU = torch.device("cpu")
METHODS = {
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
        data = VisionTasks(str(path / "suite.yaml"), batch_size=500)
        data.check({"val", "test"}, proxies=True)
        suite = data.suite
        clip = load_clip(suite.backbone)
        prompts = {task.name: (task.classes, task.templates) for task in suite.tasks.values()}
        heads = build_heads(clip, open_clip.get_tokenizer(suite.backbone), prompts, describe_backbone(suite.backbone).model, CPU)
        encoder = VisionEncoder(clip.visual)
        self.bench = Workbench(describe_backbone(suite.backbone), encoder, encoder.weights(), heads, data, CPU)
        self.experts = {task.name: open_weights(task.expert) for task in suite.tasks.values()}
        self.expected = json.loads((path / "expected.json").read_text())
        self._merged: dict[str, Merged] = {}

    def merged(self, row: str) -> Merged:
        if row not in self._merged:
            name, arguments = METHODS[row]
            merger: Merger = mergers()[name](**arguments)
            self._merged[row] = self.bench.merge(merger, self.experts)
        return self._merged[row]

    def accuracies(self, split: str, weights=None) -> dict[str, float]:
        with self.bench.wearing(self.bench.base if weights is None else weights):
            return {task: 100 * self.bench.accuracy(task, split) for task in self.experts}

    def mean(self, row: str, split: str, scale: float) -> float:
        values = self.accuracies(split, merged_weights(self.bench.base, self.merged(row), scale))
        return sum(values.values()) / len(values)

    def routed(self, merger: Merger, scale: float, split: str, mode: str) -> float:
        """Mean accuracy of a dynamic model whose base is used at ``scale``."""
        row = f"{merger} at {scale}"
        if row not in self._merged:
            self._merged[row] = self.bench.merge(merger, self.experts, lambda _: scale)
        merged = self._merged[row]
        encoder = copy.deepcopy(self.bench.encoder)
        encoder.assign(merged_weights(self.bench.base, merged))
        encoder.route(merged.routed)
        encoder.routing.mode = mode
        values = []
        for index, task in enumerate(self.experts):
            loader = self.bench.data.loader(task, split)
            told = Told(encoder, index)
            values.append(measure(told, self.bench.heads, task, loader, len(loader.dataset), self.bench.device))
        return 100 * sum(values) / len(values)


class Told(nn.Module):
    """An encoder that is told the true task of its images."""

    def __init__(self, encoder: VisionEncoder, task: int) -> None:
        super().__init__()
        self.encoder, self.task = encoder, task

    def forward(self, images: Tensor) -> Tensor:
        self.encoder.routing.truth = torch.full((len(images),), self.task)
        return self.encoder(images)


@pytest.fixture(scope="module")
def real(zoo: Path, tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGEKIT_VISION_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Zoo(zoo)


def test_zero_shot_backbone(real: Zoo) -> None:
    for task, value in real.accuracies("test").items():
        assert value == pytest.approx(real.expected["zero_shot"][task], abs=0.1), task


def test_single_experts(real: Zoo) -> None:
    for task, expert in real.experts.items():
        value = 100 * real.bench.expert_accuracy(task, "test", expert)
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
    own = {task: real.bench.expert_accuracy(task, "val", expert) for task, expert in real.experts.items()}
    chosen = real.bench.search(real.merged(row), ScaleSearch(), own)[0]["coefficient"]
    assert real.mean(row, "test", chosen) == pytest.approx(real.expected[row]["test"]["avg"], abs=0.5)


@pytest.mark.parametrize("mode", ["router", "oracle"])
@pytest.mark.parametrize(
    ("base", "rank"),
    [("esm", 32), *(pytest.param(base, rank, marks=pytest.mark.slow) for base, rank in (("esm", 8), ("base", 8), ("base", 32)))],
)
def test_esmpp_by_the_published_rule_and_by_the_oracle(real: Zoo, base: str, rank: int, mode: str) -> None:
    merger = ESMPP(rank=rank) if base == "esm" else ESMPP(base=TaskArithmetic(), rank=rank)
    scale = real.expected["esm"]["alpha"] if base == "esm" else 0.0
    expected = real.expected[f"esmpp_on_{base}_r{rank}"]["test" if mode == "router" else "oracle"]["avg"]
    assert real.routed(merger, scale, "test", mode) == pytest.approx(expected, abs=0.5)
