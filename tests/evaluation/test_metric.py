"""Counts of right predictions."""

import pytest
import torch

from mergekit_vision.evaluation.metric import TaskMetric


def test_accuracy_of_uneven_batches_is_the_share_of_right_images() -> None:
    logits = torch.randn(11, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(11) % 4
    metric = TaskMetric()
    for batch in (slice(0, 7), slice(7, 10), slice(10, 11)):
        metric.update(logits[batch], labels[batch])
    right = int((logits.argmax(1) == labels).sum())
    assert metric.compute().tolist() == [right, 11]
    assert metric.accuracy(11) == right / 11


def test_logits_that_are_no_numbers_are_wrong() -> None:
    metric = TaskMetric()
    metric.update(torch.tensor([[torch.nan, torch.nan], [1.0, torch.nan], [torch.inf, 0.0], [1.0, 0.0]]), torch.zeros(4).long())
    assert metric.compute().tolist() == [1, 4]


def test_a_missing_image_does_not_pass_unnoticed() -> None:
    metric = TaskMetric()
    metric.update(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="3 images of a data set that has 4"):
        metric.accuracy(4)


def test_counting_does_not_wait_for_the_device() -> None:
    metric = TaskMetric().to("meta")  # where whatever reads a value fails
    metric.update(torch.zeros(3, 4, device="meta"), torch.zeros(3, dtype=torch.int64, device="meta"))
    with pytest.raises(NotImplementedError):
        metric.accuracy(3)


def test_counts_are_exact_beyond_what_float32_holds() -> None:
    metric = TaskMetric()
    metric.right_and_seen += 2**24
    metric.update(torch.eye(2), torch.tensor([0, 0]))
    assert metric.accuracy(2**24 + 2) == (2**24 + 1) / (2**24 + 2)
