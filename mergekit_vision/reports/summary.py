"""Accuracies summed up."""

from collections.abc import Mapping
from typing import Any

import torch


def summarize(accuracy: Mapping[str, float], expert: Mapping[str, float | None], images: Mapping[str, int]) -> dict[str, Any]:
    """The ``tasks`` and ``mean`` parts of ``results.json``; accuracies in [0, 1].

    Args:
        accuracy: task -> accuracy.
        expert: task -> accuracy of the task's own expert, ``None`` where it is not known.
        images: task -> number of images evaluated.

    >>> from mergekit_vision.reports.summary import summarize
    >>> summarize({"a": 0.5, "b": 0.8}, {"a": 1.0, "b": 0.8}, {"a": 10, "b": 20})["mean"]
    {'accuracy': 0.65, 'normalized': 0.75}
    """
    tasks = {}
    for task, value in accuracy.items():
        own = expert.get(task)
        tasks[task] = {"accuracy": value, "normalized": value / own if own else None, "n": images[task]}
    return {"tasks": tasks, "mean": {key: _mean([row[key] for row in tasks.values()]) for key in ("accuracy", "normalized")}}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def own_expert_shares(counts: Mapping[str, torch.Tensor], experts: list[str]) -> dict[str, dict[str, float]]:
    """How often the images of a task pick their own task's expert.

    Args:
        counts: layer -> ``[T, T]``, images of each true task (row) by expert taken (column).
        experts: tasks of the rows and columns.

    Returns:
        Layer -> task -> share in [0, 1]; tasks without images are left out.

    >>> import torch
    >>> from mergekit_vision.reports.summary import own_expert_shares
    >>> own_expert_shares({"c_fc": torch.tensor([[3.0, 1.0], [0.0, 0.0]])}, ["mnist", "gtsrb"])
    {'c_fc': {'mnist': 0.75}}
    """
    shares = {}
    for layer, count in counts.items():
        rows = zip(experts, count.diagonal().tolist(), count.sum(1).tolist(), strict=True)
        shares[layer] = {task: own / total for task, own, total in rows if total}
    return {layer: tasks for layer, tasks in shares.items() if tasks}
