"""Many methods on one suite: each is merged and evaluated once, remembered by content, and shown beside the others."""

import inspect
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import nn

from mergekit_vision import memory, registry
from mergekit_vision.analysis import EnergyCurve, describe_experts
from mergekit_vision.checkpoints import open_weights
from mergekit_vision.encoder import VisionEncoder
from mergekit_vision.errors import EvaluationError, InputError
from mergekit_vision.memory import Entry, Memory
from mergekit_vision.merger import Merger
from mergekit_vision.module import MergedCLIP
from mergekit_vision.progress import say, track
from mergekit_vision.results import own_expert_shares, summarise, versions
from mergekit_vision.source_code import code_fingerprint
from mergekit_vision.workbench import Workbench

SPLIT = "test"


def chosen_mergers(chosen: str | Sequence[str]) -> dict[str, Merger]:
    """The methods to compare, with their default parameters.

    Args:
        chosen: ``all`` for every registered method, or names and class paths: a list, or one text with commas.

    Returns:
        Name to show -> method, in the order given.

    Raises:
        InputError: when there is none of that name, or one cannot be made without arguments.

    >>> list(chosen_mergers("TSVM, mergekit_vision.plugins.ties.TIES"))
    ['TSVM', 'TIES']
    """
    if chosen == "all":
        return _all_mergers()
    if list(chosen) == ["all"]:
        return _all_mergers()
    names = [name.strip() for name in (chosen.split(",") if isinstance(chosen, str) else dict.fromkeys(chosen)) if name.strip()]
    if not names:
        raise InputError("--mergers: name at least one method, or give all")
    found = {name: registry.get(name) for name in names}
    for name, merger in found.items():
        if missing := _required(merger):
            raise InputError(f"--mergers {name}: has no default for {', '.join(missing)}; use `test --model.merger {name}`")
    short = [merger.__name__ for merger in found.values()]
    return {merger.__name__ if short.count(merger.__name__) == 1 else name: _made(name, merger) for name, merger in found.items()}


def _all_mergers() -> dict[str, Merger]:
    unfit = {name: f"it cannot be imported ({type(error).__name__}: {error})" for name, error in registry.broken().items()}
    found = registry.mergers()
    unfit |= {name: f"it has no default for {', '.join(missing)}" for name, m in found.items() if (missing := _required(m))}
    for name, reason in unfit.items():
        say(f"{name} is left out: {reason}")
    return {name: _made(name, merger) for name, merger in found.items() if name not in unfit}


def _required(merger: type[Merger]) -> list[str]:
    """Parameters without a default."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(merger).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


def _made(name: str, merger: type[Merger]) -> Merger:
    try:
        return merger()
    except (ValueError, TypeError) as error:  # a plugin's own constructor
        raise InputError(f"--mergers {name}: {error}") from error


class Comparison:
    """Evaluates methods on the ``test`` split of a suite; every process runs it, and all take the first one's decisions.

    Args:
        model: how to merge: coefficient, search, experts, route.
        mergers: name -> method.
        lenient: leave out a method that refuses the suite, and say so, instead of ending with its error.

    Attributes:
        results: what ``results.json`` holds, once the comparison has run.
    """

    def __init__(self, model: MergedCLIP, mergers: Mapping[str, Merger], lenient: bool = False) -> None:
        self.model, self.mergers, self.lenient = model, mergers, lenient
        self.results: dict[str, Any] = {}
        self._measured = 0

    def __call__(self, bench: Workbench) -> None:
        """Evaluate the backbone, the experts and every method, and compare the experts with each other."""
        trainer = self.model.trainer
        self._memory = Memory(trainer.strategy.broadcast, trainer.is_global_zero)
        backbone, evaluation = memory.of_backbone(bench), memory.of_evaluation(bench, SPLIT)
        experts = memory.of_experts(bench, self.model.experts())
        zero_shot = self._memory.recall([*backbone, *evaluation], lambda: {"accuracy": _accuracies(bench)})
        own = self._own_accuracies(bench)
        methods, left_out = self._methods(bench, [*backbone, *evaluation, *experts, *self._choice(bench)])
        analysis = self._memory.recall(
            [*backbone, *experts, code_fingerprint([EnergyCurve]) or ""],
            lambda: describe_experts(bench.inputs(self.model.experts())),
        )
        self.results = {
            **self._setting(bench),
            "rows": _rows(bench, zero_shot["accuracy"], own, methods),
            "left_out": left_out,
            **analysis,
        }

    def _own_accuracies(self, bench: Workbench) -> dict[str, float]:
        tasks = bench.data.suite.tasks
        names = track(bench.data.task_names, f"experts' own accuracy on {SPLIT}")
        return {name: bench.expert_accuracy(name, SPLIT, open_weights(tasks[name].expert)) for name in names}

    def _choice(self, bench: Workbench) -> list[str]:
        """What the coefficient and the routing depend on, besides the method."""
        model, parts = self.model, [str(self.model.scale), self.model.route]
        if model.scale == "search":
            parts += [str(model.search), *(bench.data.fingerprint(task, "val") for task in model.experts())]
        return parts

    def _methods(self, bench: Workbench, conditions: list[str]) -> tuple[dict[str, Entry], dict[str, str]]:
        """What was measured of each method, and why others were left out."""
        found: dict[str, Entry] = {}
        left_out: dict[str, str] = {}
        for number, (name, merger) in enumerate(self.mergers.items(), start=1):
            place = f"[{number}/{len(self.mergers)}] {name}"
            code, before = memory.of_merger(merger), self._measured
            try:
                found[name] = self._memory.recall(
                    None if code is None else [*conditions, *code], partial(self._measure, bench, merger, place)
                )
            except EvaluationError:
                raise
            except InputError as error:
                if not self.lenient:
                    raise
                left_out[name] = str(error)
                say(f"{place} is left out: {error}")
                continue
            accuracy = found[name]["accuracy"].values()
            known = ", known from an earlier run" if self._measured == before else ""
            say(f"{place}: {100 * sum(accuracy) / len(accuracy):.2f} % on {SPLIT}{known}")
        return found, left_out

    def _measure(self, bench: Workbench, merger: Merger, place: str) -> Entry:
        """Merge, choose the coefficient, evaluate every task."""
        say(f"{place} …")
        self._measured += 1
        model = self.model
        weights, routed = model.merge_with(bench, merger)
        merged = list(model.record["experts"])
        start = time.perf_counter()
        with bench.using(weights, routed) as using:
            encoder = using.encoder
            if encoder.routing is not None:
                encoder.routing.mode = model.route
                encoder.routing.record(model.route == "router")
            accuracy = _accuracies(using, merged)
            counts = model.routing_counts(encoder)
            extra = _size(encoder) - _size(bench.encoder)
        changed = any(weights[key] is not value for key, value in bench.base.items())
        return {
            "merger": model.record["merger"],
            "scale": model.record["scale"] if changed else None,  # of nothing, no coefficient makes a difference
            "search": model.record["search"],
            "accuracy": accuracy,
            "seconds": {**model.record["seconds"], "eval": round(time.perf_counter() - start, 3)},
            "dynamic": bool(routed),
            "extra_parameters": extra,
            "routing": own_expert_shares(counts, merged) or None,
        }

    def _setting(self, bench: Workbench) -> dict[str, Any]:
        """How the comparison was made."""
        model, data, suite = self.model, bench.data, bench.data.suite
        sizes = {task: data.size(task, SPLIT) for task in data.task_names}
        return {
            "suite": suite.name,
            "backbone": suite.backbone,
            "pretrained": suite.pretrained,
            "parameters": sum(value.numel() for value in bench.base.values()),
            "experts": {task: os.path.relpath(weights.path, suite.path.parent) for task, weights in model.experts().items()},
            "tasks": {task: {"images": size, "classes": len(suite.tasks[task].classes)} for task, size in sizes.items()},
            "split": SPLIT,
            "scale": model.scale,
            "search": asdict(model.search) if model.scale == "search" else None,
            "route": model.route,
            "proxies": asdict(data.proxies),
            "seed": int(os.environ.get("PL_GLOBAL_SEED", "0")),
            "precision": bench.precision_name,
            "device": bench.device.type,
            "processes": model.trainer.world_size,
            "versions": versions(),
        }


def _rows(
    bench: Workbench, zero_shot: Mapping[str, float], own: Mapping[str, float], methods: Mapping[str, Entry]
) -> list[dict[str, Any]]:
    """The rows of the table: the backbone, the methods by their mean accuracy, the experts; accuracies in [0, 1]."""
    sizes = {task: bench.data.size(task, SPLIT) for task in bench.data.task_names}
    model = sum(value.numel() for value in bench.base.values())

    def row(name: str, kind: str, accuracy: Mapping[str, float], **found: Any) -> dict[str, Any]:
        summary = summarise(accuracy, own, sizes)
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


def _accuracies(bench: Workbench, merged: Sequence[str] = ()) -> dict[str, float]:
    """Accuracy of the encoder on every task; a dynamic one is told which of the ``merged`` tasks the images are of."""
    found, routing = {}, bench.encoder.routing
    for task in track(bench.data.task_names, f"evaluating on {SPLIT}"):

        def tell(_: nn.Module, args: tuple[torch.Tensor, ...], task: str = task) -> None:
            if routing is not None:
                routing.truth = torch.full((len(args[0]),), merged.index(task)) if task in merged else None

        handle = bench.encoder.register_forward_pre_hook(tell)
        try:
            found[task] = bench.accuracy(task, SPLIT)
        finally:
            handle.remove()
    return found


def _size(encoder: VisionEncoder) -> int:
    """Number of parameters and buffers."""
    return sum(value.numel() for value in (*encoder.parameters(), *encoder.buffers()))
