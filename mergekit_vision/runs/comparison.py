"""Many methods on one suite: each is merged and evaluated once, remembered by content, and shown beside the others."""

import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule

from mergekit_vision.encoders.vision import VisionEncoder
from mergekit_vision.errors import EvaluationError, InputError
from mergekit_vision.evaluation.evaluator import Evaluator
from mergekit_vision.merger import Merger
from mergekit_vision.merging.analysis import EnergyCurve, expert_analysis
from mergekit_vision.merging.lineage import check_lineage
from mergekit_vision.merging.recipe import Recipe, expert_paths
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.reports.summary import own_expert_shares, summarize
from mergekit_vision.runs import conditions, entries
from mergekit_vision.runs.checks import check_alike
from mergekit_vision.runs.entries import Entry
from mergekit_vision.runs.runtime import data_of, runtime_of
from mergekit_vision.suites.expectations import departures
from mergekit_vision.suites.splits import TEST
from mergekit_vision.support.cache import Cache, Form
from mergekit_vision.support.console import logger, track
from mergekit_vision.support.source_code import code_fingerprint, versions


class Comparison(LightningModule):
    """Evaluates methods on the ``test`` split of a suite while it is set up; every process does, and all get the same.

    Args:
        recipe: how to merge: coefficient, search, experts, route.
        mergers: name -> method.
        lenient: leave out a method that refuses the suite, and say so, instead of ending with its error.

    Attributes:
        results: what ``results.json`` holds, once the comparison has run.
    """

    def __init__(self, recipe: Recipe, mergers: Mapping[str, Merger], lenient: bool = False) -> None:
        super().__init__()
        self.recipe, self.mergers, self.lenient = recipe, mergers, lenient
        self.results: dict[str, Any] = {}
        self._measured = 0

    def prepare_data(self) -> None:
        """Download what will be read, in one process of each machine."""
        data_of(self.trainer).fetch(self.recipe.needs(frozenset({TEST})))

    def setup(self, stage: str) -> None:
        """Evaluate the backbone, the experts and every method, and compare the experts with each other."""
        data = data_of(self.trainer)
        needs, runtime = self.recipe.needs(frozenset({TEST})), runtime_of(self.trainer)
        data.check(needs)
        check_alike(data, needs, runtime.team)
        bench = Workbench.open(data, runtime)
        evaluator, experts = bench.evaluator, self.recipe.chosen(data.suite)
        check_lineage(experts, bench.base, evaluator.encoder.linears)

        def cache(form: Form[Entry]) -> Cache[Entry]:
            return Cache("comparisons", form, evaluator.runtime.team)

        backbone, evaluation = conditions.of_backbone(bench), conditions.of_evaluation(evaluator, TEST)
        merging = conditions.of_experts(evaluator, experts)
        tasks = data.task_names
        zero_shot = cache(entries.accuracies(tasks)).recall(
            [*backbone, *evaluation], lambda: {"accuracy": _accuracies(evaluator)}
        )
        own = {task: evaluator.expert_accuracy(task, TEST) for task in track(tasks, f"experts' own accuracy on {TEST}")}
        for text in departures(data.suite.tasks.values(), own):
            logger.warning(text)
        shared = [*backbone, *evaluation, *merging, *conditions.of_recipe(evaluator, self.recipe)]
        methods, left_out = self._methods(bench, cache(entries.method(tasks)), shared)
        analysis = cache(entries.analysis(experts)).recall(
            [*backbone, *merging, code_fingerprint([EnergyCurve, Workbench]) or ""],
            lambda: expert_analysis(bench.inputs({task: evaluator.expert(task) for task in experts})),
        )
        self.results = {
            "kind": "comparison",
            "schema": 1,
            **self._setting(bench),
            "rows": _rows(bench, zero_shot["accuracy"], own, methods),
            "left_out": left_out,
            **analysis,
        }

    def predict_step(self, *args: Any) -> None:
        """Nothing: the trainer predicts on no images, so that it sets this module up and does no more."""

    def _methods(self, bench: Workbench, cache: Cache[Entry], shared: list[str]) -> tuple[dict[str, Entry], dict[str, str]]:
        """What was measured of each method, and why others were left out."""
        found: dict[str, Entry] = {}
        left_out: dict[str, str] = {}
        for number, (name, merger) in enumerate(self.mergers.items(), start=1):
            place = f"[{number}/{len(self.mergers)}] {name}"
            code, before = conditions.of_merger(merger), self._measured
            try:
                parts = None if code is None else [*shared, *code]
                found[name] = cache.recall(parts, partial(self._measure, bench, merger, place))
            except EvaluationError:
                raise
            except InputError as error:
                if not self.lenient:
                    raise
                left_out[name] = str(error)
                logger.info("%s is left out: %s", place, error)
                continue
            accuracy = found[name]["accuracy"].values()
            known = ", known from an earlier run" if self._measured == before else ""
            logger.info("%s: %.2f %% on %s%s", place, 100 * sum(accuracy) / len(accuracy), TEST, known)
        return found, left_out

    def _measure(self, bench: Workbench, merger: Merger, place: str) -> Entry:
        """Merge, choose the coefficient, evaluate every task."""
        logger.info("%s …", place)
        self._measured += 1
        model = self.recipe.merge(bench, merger)
        experts, route = list(model.record["experts"]), self.recipe.route
        start = time.perf_counter()
        with bench.evaluator.with_model(model.weights, model.routed, experts, route) as evaluator:
            if evaluator.encoder.routing is not None:
                evaluator.encoder.routing.record(route == "router")
            accuracy = _accuracies(evaluator)
            counts = evaluator.routing_counts()
            extra = _size(evaluator.encoder) - _size(bench.evaluator.encoder)
        changed = any(model.weights[key] is not value for key, value in bench.base.items())
        return {
            "merger": model.record["merger"],
            "scale": model.record["scale"] if changed else None,  # of nothing, no coefficient makes a difference
            "search": model.record["search"],
            "accuracy": accuracy,
            "seconds": {**model.record["seconds"], "eval": round(time.perf_counter() - start, 3)},
            "dynamic": bool(model.routed),
            "extra_parameters": extra,
            "routing": own_expert_shares(counts, experts) or None,
        }

    def _setting(self, bench: Workbench) -> dict[str, Any]:
        """How the comparison was made."""
        recipe, data, runtime = self.recipe, bench.evaluator.data, bench.evaluator.runtime
        suite, linears = data.suite, bench.evaluator.encoder.linears
        sizes = {task: data.size(task, TEST) for task in data.task_names}
        return {
            "suite": suite.name,
            "backbone": suite.backbone,
            "pretrained": suite.pretrained,
            "parameters": sum(value.numel() for value in bench.base.values()),
            "layers": {linear.name: {"block": linear.block, "kind": linear.kind} for linear in linears},
            "experts": expert_paths(suite, recipe.chosen(suite)),
            "tasks": {task: {"images": size, "classes": len(suite.tasks[task].classes)} for task, size in sizes.items()},
            "split": TEST,
            "hub": data.hub_sources(TEST),
            "scale": recipe.scale,
            "search": asdict(recipe.search) if recipe.scale in ("search", "agreement") else None,
            "route": recipe.route,
            "proxies": asdict(data.proxies),
            "seed": int(os.environ.get("PL_GLOBAL_SEED", "0")),
            "precision": runtime.precision_name,
            "device": runtime.device.type,
            "processes": runtime.team.size,
            "versions": versions(),
        }


def _rows(
    bench: Workbench, zero_shot: Mapping[str, float], own: Mapping[str, float], methods: Mapping[str, Entry]
) -> list[dict[str, Any]]:
    """The rows of the table: the backbone, the methods by their mean accuracy, the experts; accuracies in [0, 1]."""
    data = bench.evaluator.data
    sizes = {task: data.size(task, TEST) for task in data.task_names}
    model = sum(value.numel() for value in bench.base.values())

    def row(name: str, kind: str, accuracy: Mapping[str, float], **found: Any) -> dict[str, Any]:
        summary = summarize(accuracy, own, sizes)
        worst = min(summary["tasks"], key=lambda task: summary["tasks"][task]["normalized"] or 0.0)
        return {"name": name, "kind": kind, **summary, "worst": worst, **found}

    measured = [
        row(name, "dynamic" if entry["dynamic"] else "static", **{key: entry[key] for key in entry if key != "dynamic"})
        for name, entry in methods.items()
    ]
    return [
        row("zero-shot", "backbone", zero_shot, extra_parameters=0),
        *sorted(measured, key=lambda found: float(found["mean"]["accuracy"])),
        row("experts", "experts", own, extra_parameters=(len(own) - 1) * model),
    ]


def _accuracies(evaluator: Evaluator) -> dict[str, float]:
    """Accuracy of the encoder on every task."""
    return {task: evaluator.accuracy(task, TEST) for task in track(evaluator.data.task_names, f"evaluating on {TEST}")}


def _size(encoder: VisionEncoder) -> int:
    """Number of parameters and buffers."""
    return sum(value.numel() for value in (*encoder.parameters(), *encoder.buffers()))
