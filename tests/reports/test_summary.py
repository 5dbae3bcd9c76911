"""Accuracies summed up."""

import pytest
import torch

from mergekit_vision.reports.summary import own_expert_shares, summarize


def test_a_task_is_measured_by_its_own_expert() -> None:
    found = summarize({"a": 0.5, "b": 0.25}, {"a": 0.8, "b": 1.0, "c": 0.1}, {"a": 10, "b": 20, "c": 30})
    assert found["tasks"] == {
        "a": {"accuracy": 0.5, "normalized": 0.5 / 0.8, "n": 10},
        "b": {"accuracy": 0.25, "normalized": 0.25, "n": 20},
    }
    assert found["mean"] == {"accuracy": 0.375, "normalized": (0.5 / 0.8 + 0.25) / 2}


@pytest.mark.parametrize("expert", [{"a": 0.8}, {"a": 0.8, "b": None}, {"a": 0.8, "b": 0.0}])
def test_a_mean_over_what_is_not_known_is_not_known(expert: dict[str, float | None]) -> None:
    found = summarize({"a": 0.5, "b": 0.25}, expert, {"a": 10, "b": 20})
    assert found["tasks"]["b"]["normalized"] is None
    assert found["mean"] == {"accuracy": 0.375, "normalized": None}


def test_shares_are_those_of_the_own_expert() -> None:
    counts = {
        "one": torch.tensor([[3.0, 1.0], [2.0, 6.0]]),
        "two": torch.tensor([[0.0, 0.0], [1.0, 1.0]]),
        "three": torch.zeros(2, 2),
    }
    assert own_expert_shares(counts, ["a", "b"]) == {"one": {"a": 0.75, "b": 0.75}, "two": {"b": 0.5}}
    assert own_expert_shares({}, ["a", "b"]) == {}
