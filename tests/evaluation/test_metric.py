import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mergekit_vision.encoders.heads import ZeroShotHeads
from mergekit_vision.evaluation.metric import TaskMetric, measure
from mergekit_vision.support.cache import remembered


def shared(value: float | None) -> float | None:
    return value


def test_accuracy_of_uneven_batches_is_the_share_of_right_images() -> None:
    logits = torch.randn(11, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(11) % 4
    metric = TaskMetric()
    for batch in (slice(0, 7), slice(7, 10), slice(10, 11)):
        metric.update(logits[batch], labels[batch])
    assert metric.compute(11) == pytest.approx((logits.argmax(1) == labels).double().mean().item())


def test_a_missing_image_does_not_pass_unnoticed() -> None:
    metric = TaskMetric()
    metric.update(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="3 images of a data set that has 4"):
        metric.compute(4)


def test_counting_does_not_wait_for_the_device() -> None:
    metric = TaskMetric().to("meta")  # where whatever reads a value fails
    metric.update(torch.zeros(3, 4, device="meta"), torch.zeros(3, dtype=torch.int64, device="meta"))
    with pytest.raises(NotImplementedError):
        metric.compute(3)


def test_counts_are_exact_beyond_what_float32_holds() -> None:
    metric = TaskMetric()
    metric.counts.right_and_seen += 2**24
    metric.update(torch.eye(2), torch.tensor([0, 0]))
    assert metric.compute(2**24 + 2) == (2**24 + 1) / (2**24 + 2)


def test_measure_runs_the_encoder_on_every_batch() -> None:
    heads = ZeroShotHeads({"task": torch.eye(3)})
    images, labels = torch.eye(3)[[0, 1, 2, 2]], torch.tensor([0, 1, 2, 0])
    batches: list[tuple[Tensor, Tensor]] = [(images[:3], labels[:3]), (images[3:], labels[3:])]
    assert measure(nn.Identity(), heads, "task", batches, 4, torch.device("cpu")) == 0.75


def test_an_accuracy_is_measured_once_for_the_same_parts(cache: Path) -> None:
    calls: list[int] = []

    def compute() -> float:
        calls.append(1)
        return 0.625

    assert [remembered(["a", "b"], compute, shared) for _ in range(3)] == [0.625] * 3
    assert len(calls) == 1
    remembered(["a", "c"], compute, shared)
    assert len(calls) == 2


@pytest.mark.parametrize("spoiled", ["", "{", "[]", '{"accuracy": null}', json.dumps({"other": 1})])
def test_a_spoiled_cache_file_is_measured_again(cache: Path, spoiled: str) -> None:
    remembered(["key"], lambda: 0.5, shared)
    (file,) = (cache / "accuracies").iterdir()
    file.write_text(spoiled)
    assert remembered(["key"], lambda: 0.75, shared) == 0.75


def test_every_process_follows_the_first_ones_cache() -> None:
    assert remembered(["elsewhere"], lambda: pytest.fail("the first process has it"), lambda _: 0.25) == 0.25
    assert remembered(["elsewhere"], lambda: 0.5, lambda _: None) == 0.5
