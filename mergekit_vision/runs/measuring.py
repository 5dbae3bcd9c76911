"""Measures the rows of a comparison: each is merged and evaluated once, and remembered by content."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.evaluation.evaluator import Evaluator
from mergekit_vision.merger import Merged, Merger, merged_weights
from mergekit_vision.merging.recipe import MergedModel, Recipe
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.reports.summary import own_expert_shares
from mergekit_vision.runs import conditions, entries
from mergekit_vision.runs.entries import Entry
from mergekit_vision.suites.splits import TEST
from mergekit_vision.support.cache import Cache, Form
from mergekit_vision.support.console import logger, track

_FLOAT = 4  # bytes


@dataclass
class Measuring:
    """Measures on one workbench.

    Attributes:
        bench: with the run's data.
        measured: how many methods were merged and evaluated, and not remembered.
    """

    bench: Workbench
    measured: int = 0
    _shared: dict[str, list[str]] = field(default_factory=dict)

    def zero_shot(self) -> Entry:
        """Accuracies of the backbone."""
        evaluator = self.bench.evaluator
        parts = [*conditions.of_backbone(self.bench), *conditions.of_evaluation(evaluator, TEST)]
        form = entries.accuracies(evaluator.data.task_names)
        return self.cache(form).recall(parts, lambda: {"accuracy": _accuracies(evaluator)})

    def method(self, merger: Merger, recipe: Recipe, data: VisionTasks, place: str) -> Entry:
        """What is found of a method: merged, its coefficient chosen, evaluated on every task.

        Args:
            merger: the method.
            recipe: how to merge.
            data: a variant of the workbench's.
            place: what to call it while it runs.
        """
        bench, code = self.bench.on(data), conditions.of_merger(merger)
        parts = None if code is None else [*self._conditions(bench, recipe), *code]
        return self.cache(entries.method(data.task_names)).recall(parts, lambda: self._found(bench, merger, recipe, place))

    def cache(self, form: Form[Entry]) -> Cache[Entry]:
        """Where entries of a form are remembered."""
        return Cache("comparisons", form, self.bench.evaluator.runtime.team)

    def _conditions(self, bench: Workbench, recipe: Recipe) -> list[str]:
        """What a result depends on besides the method; the same for many."""
        evaluator = bench.evaluator
        key = repr((recipe, evaluator.data.proxies, evaluator.data.task_names))
        if key not in self._shared:
            self._shared[key] = [
                *conditions.of_backbone(bench),
                *conditions.of_evaluation(evaluator, TEST),
                *conditions.of_experts(evaluator, recipe.chosen(evaluator.data.suite)),
                *conditions.of_recipe(evaluator, recipe),
            ]
        return self._shared[key]

    def _found(self, bench: Workbench, merger: Merger, recipe: Recipe, place: str) -> Entry:
        logger.info("%s …", place)
        self.measured += 1
        model = recipe.merge(bench, merger)
        if model.oracle is not None:
            return self._told(bench, model.record, model.oracle)
        experts, route = list(model.record["experts"]), recipe.route
        start = time.perf_counter()
        with bench.evaluator.with_model(model.weights, model.routed, experts, route) as evaluator:
            if evaluator.encoder.routing is not None:
                evaluator.encoder.routing.record(route == "router")
            accuracy = _accuracies(evaluator)
            counts = evaluator.routing_counts()
        stored, shared = _bytes(model)
        changed = any(model.weights[key] is not value for key, value in bench.base.items())
        return {
            "merger": model.record["merger"],
            "scale": model.record["scale"] if changed else None,  # of nothing, no coefficient makes a difference
            "search": model.record["search"],
            "accuracy": accuracy,
            "seconds": {**model.record["seconds"], "eval": round(time.perf_counter() - start, 3)},
            "dynamic": bool(model.routed),
            "oracle": bool(model.routed) and route == "oracle",
            "extra_parameters": (stored + shared) // _FLOAT,
            "bytes": {"task": stored // len(experts), "shared": shared},
            "routing": own_expert_shares(counts, experts) or None,
        }

    def _told(self, bench: Workbench, record: Mapping[str, Any], merged: Merged) -> Entry:
        """What is found of compressed experts, each on the images of its own task; the backbone on those without one."""
        start, accuracy = time.perf_counter(), {}
        for task in track(bench.evaluator.data.task_names, f"evaluating on {TEST}"):
            expert = Merged(dict(merged.experts[task].update()) if task in merged.experts else {})
            with bench.evaluator.with_weights(merged_weights(bench.base, expert, release=True)) as evaluator:
                accuracy[task] = evaluator.accuracy(task, TEST)
        sizes = [expert.bytes for expert in merged.experts.values()]
        return {
            "merger": record["merger"],
            "scale": None,
            "search": record["search"],
            "accuracy": accuracy,
            "seconds": {**record["seconds"], "eval": round(time.perf_counter() - start, 3)},
            "dynamic": False,
            "oracle": True,
            "extra_parameters": (merged.shared_bytes + sum(sizes)) // _FLOAT,
            "bytes": {"task": round(fmean(sizes)), "shared": merged.shared_bytes},
            "routing": None,
        }


def _accuracies(evaluator: Evaluator) -> dict[str, float]:
    """Accuracy of the encoder on every task."""
    return {task: evaluator.accuracy(task, TEST) for task in track(evaluator.data.task_names, f"evaluating on {TEST}")}


def _bytes(model: MergedModel) -> tuple[int, int]:
    """What all routed experts take as they are stored, and what they share besides one encoder: the routers."""
    parts = [(key, part.nbytes) for experts in model.routed.values() for key, part in experts.stored()[0].items()]
    shared = sum(size for key, size in parts if key.startswith("router."))
    return sum(size for _, size in parts) - shared, shared
