"""The choice of a merged model's scaling coefficient."""

import time
from collections.abc import Mapping, Sequence
from typing import Literal

from mergekit_vision.errors import InputError
from mergekit_vision.merger import Merged, merged_weights
from mergekit_vision.merging.scaling import ScaleSearch, search_scale
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.suites.splits import VAL
from mergekit_vision.support.console import logger, track
from mergekit_vision.support.fingerprints import digest, of_tensors

Scale = float | Literal["merger", "search"]
Curve = list[dict[str, float]]
"""Coefficients that were tried, the best first, each with its mean ``accuracy`` and mean ``normalized`` accuracy in [0, 1]."""


class ScaleChoice:
    """Answers at which coefficient a merged model is used, and keeps how that was found.

    Args:
        bench: measures accuracies.
        experts: tasks of the merged experts.
        scale: a number, ``merger`` for the method's own, or ``search``.
        search: range and effort of a search.

    Attributes:
        curve: every coefficient a search tried, the best first.
        seconds: time the search took.
    """

    def __init__(self, bench: Workbench, experts: Sequence[str], scale: Scale, search: ScaleSearch) -> None:
        self._bench, self._experts, self._scale, self._search = bench, experts, scale, search
        self._used = False
        self.curve: Curve = []
        self.seconds = 0.0

    def __call__(self, merged: Merged) -> float:
        """The coefficient of ``merged``; its own where nothing in it can be scaled."""
        if self._scale == "merger" or not merged.scalable:
            if self._scale != "merger" and not self._used:
                logger.info("this method has no scaling coefficient to set or search")
            return merged.scale
        self._used = True
        if self._scale != "search":
            return float(self._scale)
        start = time.perf_counter()
        self.curve = search_coefficient(self._bench, merged, self._search, self._own_accuracies())
        self.seconds += time.perf_counter() - start
        logger.info("chosen: coefficient %.4g", self.curve[0]["coefficient"])
        return self.curve[0]["coefficient"]

    def _own_accuracies(self) -> dict[str, float]:
        tasks = track(self._experts, f"experts' own accuracy on {VAL}")
        own = {task: self._bench.evaluator.expert_accuracy(task, VAL) for task in tasks}
        wrong = [task for task, accuracy in own.items() if not accuracy]
        if wrong:
            raise InputError(f"the expert of {', '.join(wrong)} gets no {VAL} image right; check its file, classes and labels")
        return own


def search_coefficient(bench: Workbench, merged: Merged, search: ScaleSearch, experts: Mapping[str, float]) -> Curve:
    """Try scaling coefficients on the ``val`` split of the merged tasks.

    A static model that the bench has searched before is not searched again: methods may build on the same one.

    Args:
        bench: measures accuracies.
        merged: what is scaled; merged once.
        search: range and effort.
        experts: task -> the expert's own accuracy on ``val``, which normalizes.
    """
    if merged.routed:
        return _searched(bench, merged, search, experts)
    content = digest(search, sorted(experts.items()), sorted(merged.fixed), of_tensors(merged.update))
    key = bench.evaluator.runtime.team.broadcast(content, 0)
    if key not in bench.curves:
        bench.curves[key] = _searched(bench, merged, search, experts)
    return bench.curves[key]


def _searched(bench: Workbench, merged: Merged, search: ScaleSearch, experts: Mapping[str, float]) -> Curve:
    rows = {}

    def normalized(coefficient: float) -> float:
        weights = merged_weights(bench.base, merged, coefficient)
        with bench.evaluator.with_model(weights, merged.routed, list(experts)) as evaluator:
            accuracy = {task: evaluator.accuracy(task, VAL) for task in experts}
        mean = sum(accuracy.values()) / len(accuracy)
        score = sum(value / experts[task] for task, value in accuracy.items()) / len(accuracy)
        rows[coefficient] = {"coefficient": coefficient, "accuracy": mean, "normalized": score}
        logger.info("coefficient %.4g: accuracy %.2f %%, normalized %.2f %% on %s", coefficient, 100 * mean, 100 * score, VAL)
        return score

    best, _ = search_scale(normalized, search)
    return [rows[best], *(row for coefficient, row in rows.items() if coefficient != best)]
