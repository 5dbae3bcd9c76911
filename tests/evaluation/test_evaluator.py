"""The one evaluator: its accuracies by hand, and an encoder that is as it was afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import changed, whole_split
from safetensors.torch import load_file, save_file
from tiny import TASKS, encoded, picture
from torch.nn import functional as F

from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.encoders.backbone import load_clip, load_tokenizer
from mergekit_vision.encoders.heads import zero_shot_head
from mergekit_vision.errors import EvaluationError
from mergekit_vision.evaluation.evaluator import Evaluator, Runtime
from mergekit_vision.evaluation.metric import TaskMetric
from mergekit_vision.merger import merged_weights
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.plugins.smile import SMILE
from mergekit_vision.support.team import Team

CPU = torch.device("cpu")


@pytest.fixture
def evaluator(bench: Workbench) -> Evaluator:
    return bench.evaluator


@torch.no_grad()
def by_hand(suite: Path, task: str, split: str, expert: bool) -> float:
    """Reference: open_clip's own model, heads and transform, one image after the other."""
    loaded = VisionTasks(str(suite)).suite
    clip = load_clip(loaded.backbone)
    if expert:
        clip.load_state_dict(dict(loaded.experts[task]), strict=False)
    head = zero_shot_head(clip, load_tokenizer(loaded.backbone), *TASKS[task])
    images, labels = whole_split(suite, task, split)
    features = torch.cat([clip.encode_image(image[None]) for image in images])
    return int(((F.normalize(features, dim=-1) @ head.T).argmax(1) == labels).sum()) / len(labels)


@pytest.mark.parametrize("task", TASKS)
def test_accuracies_are_those_of_open_clip(evaluator: Evaluator, tiny_suite: Path, task: str) -> None:
    assert evaluator.accuracy(task, "test") == by_hand(tiny_suite, task, "test", expert=False)
    assert evaluator.expert_accuracy(task, "test") == by_hand(tiny_suite, task, "test", expert=True)


def test_a_step_counts_one_batch(evaluator: Evaluator, tiny_suite: Path) -> None:
    images, labels = whole_split(tiny_suite, "grays", "val")
    metric = TaskMetric()
    with torch.no_grad():
        for part in (slice(0, 30), slice(30, 37)):
            evaluator.step(metric, images[part], labels[part], "grays")
        right = int((evaluator.heads()(evaluator.encoder(images), "grays").argmax(1) == labels).sum())
    assert metric.compute().tolist() == [right, 37]


def test_other_weights_run_while_the_context_is_open(bench: Workbench) -> None:
    evaluator, expert = bench.evaluator, bench.evaluator.data.suite.experts["grays"]
    before = {key: value.clone() for key, value in evaluator.encoder.weights().items()}

    def interrupted() -> None:
        with evaluator.with_weights(expert) as other:
            assert other is evaluator
            assert all(torch.equal(value, expert[key]) for key, value in evaluator.encoder.weights().items())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(torch.equal(value, before[key]) for key, value in evaluator.encoder.weights().items())
    assert all(torch.equal(value, before[key]) for key, value in bench.base.items())


def test_a_dynamic_model_leaves_the_plain_encoder_plain(bench: Workbench) -> None:
    merged = bench.merge(SMILE(rank=4), bench.evaluator.data.suite.experts)
    tasks, evaluator = list(TASKS), bench.evaluator
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = evaluator.encoder(images)
        with evaluator.with_model(merged_weights(bench.base, merged), merged.routed, tasks, "router") as dynamic:
            assert dynamic.experts == tuple(tasks)
            assert dynamic.encoder.routing is not None
            assert not torch.equal(dynamic.encoder(images), plain)
        assert evaluator.encoder.routing is None
        assert evaluator.experts == ()
        assert torch.equal(evaluator.encoder(images), plain)


@contextmanager
def dynamic(bench: Workbench, route: str) -> Iterator[Evaluator]:
    """A mixture of all experts of full rank; ``oracle`` is each expert itself."""
    merged = bench.merge(SMILE(rank=99), bench.evaluator.data.suite.experts)
    weights = {**bench.base, **{key: bench.base[key] + value for key, value in merged.update.items()}}
    with bench.evaluator.with_model(weights, merged.routed, list(TASKS), route) as evaluator:
        yield evaluator


def test_the_true_task_is_told_of_merged_tasks_only(bench: Workbench) -> None:
    metric, images, labels = TaskMetric(), torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64)
    with dynamic(bench, "router") as evaluator, torch.no_grad():
        routing = evaluator.encoder.routing
        assert routing is not None
        evaluator.step(metric, images, labels, "stripes")
        assert routing.truth is not None
        assert routing.truth.tolist() == [2, 2]
        without = replace(evaluator, experts=("colors", "stripes"))
        without.step(metric, images, labels, "stripes")
        assert routing.truth.tolist() == [1, 1]
        without.step(metric, images, labels, "grays")
        assert routing.truth is None


def test_an_expert_is_measured_without_the_routed_experts_of_the_model(bench: Workbench) -> None:
    expected = {task: bench.evaluator.expert_accuracy(task, "val") for task in TASKS}
    with dynamic(bench, "oracle") as evaluator, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGEKIT_VISION_CACHE", "/dev/null/nowhere")  # measured again
        assert {task: evaluator.expert_accuracy(task, "val") for task in TASKS} == expected
        assert evaluator.encoder.routing is not None
        assert evaluator.encoder.routing.mode == "oracle"


def test_an_experts_accuracy_is_measured_once_for_the_same_content(
    evaluator: Evaluator, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[str, str]] = []
    accuracy = Evaluator.accuracy

    def counting(self: Evaluator, task: str, split: str) -> float:
        measured.append((task, split))
        return accuracy(self, task, split)

    monkeypatch.setattr(Evaluator, "accuracy", counting)
    found = [evaluator.expert_accuracy("grays", "val") for _ in range(3)]
    copied = Workbench.open(VisionTasks(str(root / "suite.yaml")), evaluator.runtime).evaluator  # elsewhere, but the same
    assert copied.expert_accuracy("grays", "val") == found[0] == found[1] == found[2]
    assert measured == [("grays", "val")]
    evaluator.expert_accuracy("grays", "test")
    evaluator.expert_accuracy("colors", "val")
    replace(evaluator, runtime=Runtime(CPU, precision_name="bf16-mixed")).expert_accuracy("grays", "val")
    assert measured == [("grays", "val"), ("grays", "test"), ("colors", "val"), ("grays", "val")]
    other = changed(root, lambda tasks: tasks["grays"].update(templates=["{}"]))
    Workbench.open(VisionTasks(other), evaluator.runtime).evaluator.expert_accuracy("grays", "val")
    assert len(measured) == 5, "another head"
    monkeypatch.setattr("mergekit_vision.evaluation.evaluator._code", lambda: ("changed", "code"))
    evaluator.expert_accuracy("grays", "val")
    assert len(measured) == 6, "other code"


@pytest.mark.parametrize("kind", ["delta", "auto"])
def test_an_expert_that_is_based_on_the_backbone_is_measured_again_on_another(
    root: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    expert = {"path": "experts/colors.safetensors", "kind": kind}
    data = VisionTasks(changed(root, lambda tasks: tasks["colors"].update(expert=expert)))
    measured: list[str] = []
    monkeypatch.setattr(Evaluator, "accuracy", lambda self, task, split: measured.append(task) or 0.5)
    evaluator = Workbench.open(data, Runtime(CPU)).evaluator
    evaluator.expert_accuracy("colors", "val")
    weights = root / "base" / "open_clip_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    for _ in range(2):
        evaluator.expert_accuracy("colors", "val")
    assert len(measured) == (2 if kind == "delta" else 1)


def test_a_damaged_image_is_an_evaluation_error(root: Path) -> None:
    for name in ("a", "b", "c"):  # one directory a class
        (root / "photos" / name).mkdir(parents=True)
        (root / "photos" / name / "1.png").write_bytes(encoded(picture("colors", 0, np.random.RandomState(0))))
    (root / "photos" / "b" / "2.png").write_bytes(b"broken")
    data = VisionTasks(changed(root, lambda tasks: tasks["colors"]["data"].update(test={"folder": "photos"})))
    evaluator = Workbench.open(data, Runtime(CPU)).evaluator
    with pytest.raises(EvaluationError, match=r"b/2\.png: not a readable image"):
        evaluator.accuracy("colors", "test")


def test_counts_of_all_processes_are_added(bench: Workbench) -> None:
    with dynamic(bench, "router") as evaluator:
        assert evaluator.encoder.routing is not None
        evaluator.encoder.routing.record()
        evaluator.accuracy("grays", "test")
        alone = evaluator.routing_counts()
        twice = replace(evaluator, runtime=Runtime(CPU, Team(0, 2, lambda value, rank: alone if value is None else value)))
        both = twice.routing_counts()
    assert list(alone) == [linear.name for linear in evaluator.encoder.linears]
    for layer, counts in alone.items():
        assert counts.sum(1).tolist() == pytest.approx([0, 41, 0], abs=41 * torch.finfo(torch.float32).eps)
        assert torch.equal(both[layer], 2 * counts)
    assert bench.evaluator.routing_counts() == {}
