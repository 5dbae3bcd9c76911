"""The choice of a merged model's scaling coefficient."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, NamedTuple

from mergekit_vision.errors import InputError
from mergekit_vision.evaluation.evaluator import Evaluator
from mergekit_vision.merger import Merged, merged_weights
from mergekit_vision.merging.agreement import Agreement, ExpertTeachers
from mergekit_vision.merging.scaling import ScaleSearch, search_scale
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.suites.splits import VAL
from mergekit_vision.support.console import logger
from mergekit_vision.support.fingerprints import digest, of_tensors

Scale = float | Literal["merger", "search", "agreement"]
Curve = list[dict[str, float]]
"""Coefficients that were tried, the best first: each with its mean ``accuracy`` and ``normalized`` accuracy on ``val``, or with
the mean ``agreement`` with and the ``distance`` from the experts on proxy images; shares in [0, 1]."""

AT_ONCE = 2
"""Coefficients whose models share a pass over images that do not stay decoded: half the decoding for one more model in memory."""


class _Found(NamedTuple):
    """What a search finds of one model: what it maximizes, what is kept, and what is said."""

    score: float
    row: dict[str, float]
    text: str


class ScaleChoice:
    """Answers at which coefficient a merged model is used, and keeps how that was found.

    Args:
        bench: measures accuracies.
        experts: tasks of the merged experts.
        scale: a number; ``merger`` for the method's own; ``search``, by accuracy on ``val``; ``agreement``, by that with the
            experts on unlabeled proxy images.
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
        if not isinstance(self._scale, str):
            return float(self._scale)
        start = time.perf_counter()
        if self._scale == "agreement":
            self.curve = search_agreement(self._bench, merged, self._search, self._experts)
        else:
            self.curve = search_coefficient(self._bench, merged, self._search, self._own_accuracies())
        self.seconds += time.perf_counter() - start
        logger.info("chosen: coefficient %.4g", self.curve[0]["coefficient"])
        return self.curve[0]["coefficient"]

    def _own_accuracies(self) -> dict[str, float]:
        own = self._bench.own_accuracies(self._experts, VAL)
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

    def measure(models: Sequence[Evaluator]) -> list[_Found]:
        found = {task: bench.evaluator.accuracies(models, task, VAL) for task in experts}
        return [_judged({task: values[at] for task, values in found.items()}, experts) for at in range(len(models))]

    def run() -> Curve:
        kept = bench.evaluator.data.stays_decoded(list(experts), VAL)
        at_once = bench.evaluator.runtime.team.broadcast(1 if kept else AT_ONCE, 0)  # shares differ by an image
        return _searched(bench, merged, search, list(experts), measure, at_once)

    return _remembered(bench, merged, (search, sorted(experts.items())), run)


def _judged(accuracy: Mapping[str, float], experts: Mapping[str, float]) -> _Found:
    mean = sum(accuracy.values()) / len(accuracy)
    score = sum(value / experts[task] for task, value in accuracy.items()) / len(accuracy)
    text = f"accuracy {100 * mean:.2f} %, normalized {100 * score:.2f} % on {VAL}"
    return _Found(score, {"accuracy": mean, "normalized": score}, text)


def search_agreement(bench: Workbench, merged: Merged, search: ScaleSearch, experts: Sequence[str]) -> Curve:
    """Try scaling coefficients by the agreement with the experts on the proxy images; no label is read.

    Args:
        bench: runs the models.
        merged: what is scaled; merged once.
        search: range and effort.
        experts: tasks of the merged experts.
    """
    found: dict[float, Agreement] = {}

    def measure(teachers: ExpertTeachers, models: Sequence[Evaluator]) -> list[_Found]:
        # the first process's figures: rounding differs between devices, and all must choose the same
        agreements = [model.runtime.team.broadcast(teachers.agreement(model), 0) for model in models]
        found.update({-agreement.distance: agreement for agreement in agreements})
        return [_agreed(agreement) for agreement in agreements]

    def run() -> Curve:
        teachers = ExpertTeachers(bench.evaluator, experts)
        curve = _searched(bench, merged, search, experts, partial(measure, teachers))
        teachers.warn_below_backbone(found[max(found)])
        return curve

    conditions = (search, "agreement", tuple(experts), repr(bench.evaluator.data.proxies))
    return _remembered(bench, merged, conditions, run)


def _agreed(agreement: Agreement) -> _Found:
    score = -agreement.distance
    text = f"agreement with the experts {100 * agreement.share:.2f} %, distance {-score:.4f}"
    return _Found(score, {"agreement": agreement.share, "distance": -score}, text)


def _remembered(bench: Workbench, merged: Merged, conditions: tuple[Any, ...], run: Callable[[], Curve]) -> Curve:
    if merged.routed:
        return run()
    content = digest(*conditions, sorted(merged.fixed), of_tensors(merged.update))
    key = bench.evaluator.runtime.team.broadcast(content, 0)
    if key not in bench.curves:
        bench.curves[key] = run()
    return bench.curves[key]


def _searched(
    bench: Workbench,
    merged: Merged,
    search: ScaleSearch,
    experts: Sequence[str],
    measure: Callable[[Sequence[Evaluator]], list[_Found]],
    at_once: int = 1,
) -> Curve:
    """Try coefficients by what ``measure`` finds of their models, of which ``at_once`` are in memory together."""
    rows = {}

    def scores(coefficients: Sequence[float]) -> list[float]:
        with ExitStack() as stack:
            models = []
            for coefficient in coefficients:
                weights, apart = merged_weights(bench.base, merged, coefficient), len(coefficients) > 1
                models.append(stack.enter_context(bench.evaluator.with_model(weights, merged.routed, experts, apart=apart)))
            found = measure(models)
        for coefficient, one in zip(coefficients, found, strict=True):
            rows[coefficient] = {"coefficient": coefficient, **one.row}
            logger.info("coefficient %.4g: %s", coefficient, one.text)
        return [one.score for one in found]

    best, tried = search_scale(scores, search, at_once)
    return [rows[best], *(rows[coefficient] for coefficient in tried if coefficient != best)]
