"""The coefficient chosen without labels, on the tiny suite."""

import logging
from pathlib import Path

import pytest
import torch
import yaml
from tiny import TASKS
from torch.nn import functional as F

from mergekit_vision import MergedCLIP, Proxies, Trainer, VisionTasks
from mergekit_vision.errors import EvaluationError, InputError
from mergekit_vision.evaluation.evaluator import Evaluator
from mergekit_vision.merger import Merged, merged_weights
from mergekit_vision.merging.agreement import ExpertTeachers
from mergekit_vision.merging.coefficient import search_agreement
from mergekit_vision.merging.scaling import ScaleSearch
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.plugins.task_arithmetic import TaskArithmetic


@pytest.fixture
def merged(bench: Workbench) -> Merged:
    return bench.merge(TaskArithmetic(), bench.evaluator.data.suite.experts)


def by_hand(bench: Workbench, weights: dict[str, torch.Tensor], task: str) -> tuple[float, float]:
    """Of a task's proxy images and its expert: share of the same class, divergence in nats."""
    images, encoder = torch.cat(list(bench.evaluator.data.proxy_loader(task))), bench.evaluator.encoder
    head, embeddings = bench.evaluator.heads().weight(task), []
    with torch.no_grad():
        for each in (weights, bench.evaluator.data.suite.experts[task]):
            encoder.assign(each)
            embeddings.append(F.normalize(encoder(images).double(), dim=-1))
    encoder.assign(bench.base)
    model, expert = ((embedding @ head.double().T).softmax(-1) for embedding in embeddings)
    share = (model.argmax(-1) == expert.argmax(-1)).double().mean().item()
    return share, (expert * (expert / model).log()).sum(-1).mean().item()


def test_every_point_is_the_agreement_with_the_experts_of_the_model_at_that_coefficient(bench: Workbench, merged: Merged) -> None:
    curve = search_agreement(bench, merged, ScaleSearch(halvings=1), list(TASKS))
    for point in curve:
        weights = merged_weights(bench.base, merged, point["coefficient"])
        share, divergence = torch.tensor([by_hand(bench, weights, task) for task in TASKS]).mean(0).tolist()
        assert point["agreement"] == pytest.approx(share)
        # float32 logits of up to 100, each off by some tens of units in the last place
        assert point["distance"] == pytest.approx(divergence, rel=1e-3, abs=1e-4)
    assert curve[0]["distance"] == min(point["distance"] for point in curve)
    assert len({point["distance"] for point in curve}) > 1, "nothing to choose: the test tests nothing"


def test_an_expert_agrees_with_itself(bench: Workbench) -> None:
    teachers = ExpertTeachers(bench.evaluator, ["grays"])
    with bench.evaluator.with_weights(bench.evaluator.data.suite.experts["grays"]) as expert:
        found = teachers.agreement(expert)
    assert found.classes == {"grays": 1.0}
    assert found.cosine == {"grays": pytest.approx(1.0, abs=1e-6)}
    assert found.distance == 0.0
    assert teachers.backbone.distance > 0.0


@pytest.fixture
def without_val(tiny_suite: Path) -> str:
    """A suite whose tasks have one split, train."""
    content = yaml.safe_load(tiny_suite.read_text())
    for task in content["tasks"].values():
        task["data"] = {"train": task["data"]["val"]}
    suite = tiny_suite.with_name("unlabeled.yaml")
    suite.write_text(yaml.safe_dump(content))
    return str(suite)


def test_no_label_is_read_and_no_val_split_is_needed(
    without_val: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Evaluator, "accuracy", lambda *_: pytest.fail("evaluated"))
    data = VisionTasks(without_val, proxies=Proxies(n=8, split="train"))
    model = MergedCLIP(TaskArithmetic(), scale="agreement", search=ScaleSearch(halvings=0))
    Trainer(default_root_dir=str(tmp_path / "out"), accelerator="cpu").merge(model, data)
    assert model.record["scale"] == min(model.record["search"], key=lambda point: point["distance"])["coefficient"]


def test_that_there_are_no_proxy_images_is_told_before_merging(
    without_val: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TaskArithmetic, "merge", lambda *_: pytest.fail("merged"))
    trainer = Trainer(default_root_dir=str(tmp_path / "out"), accelerator="cpu")
    with pytest.raises(InputError, match=r"3 faults\n.*tasks\.colors.*val(.|\n)*stripes"):
        trainer.merge(MergedCLIP(TaskArithmetic(), scale="agreement"), VisionTasks(without_val))
    with pytest.raises(InputError, match=r"1 fault\n.*tasks\.grays"):
        trainer.merge(MergedCLIP(TaskArithmetic(), scale="agreement", experts=["grays"]), VisionTasks(without_val))


def test_tasks_that_end_below_the_backbone_are_named(bench: Workbench, caplog: pytest.LogCaptureFixture) -> None:
    teachers = ExpertTeachers(bench.evaluator, list(TASKS))
    worse = teachers.backbone._replace(classes={**teachers.backbone.classes, "stripes": -1.0})
    with caplog.at_level(logging.WARNING, logger="mergekit_vision"):
        teachers.warn_below_backbone(worse)
    (record,) = caplog.records
    assert "stripes" in record.getMessage()


def test_a_task_without_proxy_images_is_named(tiny_suite: Path, bench: Workbench) -> None:
    bench.evaluator.data.proxies = Proxies(split="train")
    bench.evaluator.data.__dict__.pop("_images", None)
    with pytest.raises(InputError, match=r"no split train.*agreement needs proxy images of every merged task"):
        ExpertTeachers(bench.evaluator, ["grays"])


def test_a_damaged_image_stays_an_error_that_ends_a_comparison(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*_: object) -> None:
        raise EvaluationError("row 1: not a readable image")

    monkeypatch.setattr(VisionTasks, "proxy_loader", damaged)
    with pytest.raises(EvaluationError, match=r"row 1.*agreement needs proxy images"):
        ExpertTeachers(bench.evaluator, list(TASKS))
