"""Many methods on one suite: each is merged and evaluated once, remembered by content, and shown beside the others."""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any

from lightning.pytorch import LightningModule

from mergekit_vision.checkpoints import Expert
from mergekit_vision.data.checks import Needs
from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.errors import EvaluationError, InputError
from mergekit_vision.merger import Merger
from mergekit_vision.merging.analysis import EnergyCurve, expert_analysis
from mergekit_vision.merging.lineage import check_lineage
from mergekit_vision.merging.recipe import Recipe, expert_paths
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.runs import conditions, entries
from mergekit_vision.runs.checks import check_alike
from mergekit_vision.runs.measuring import Measuring
from mergekit_vision.runs.papers import with_papers
from mergekit_vision.runs.rows import Measured, table_rows
from mergekit_vision.runs.runtime import data_of, runtime_of
from mergekit_vision.runs.variants import Variant, differing, of_mergers, settings
from mergekit_vision.suites.expectations import departures
from mergekit_vision.suites.papers import published_numbers
from mergekit_vision.suites.splits import TEST, VAL
from mergekit_vision.support.console import logger, track
from mergekit_vision.support.source_code import code_fingerprint, versions
from mergekit_vision.support.team import Team

_MOST_SEEDS = 1000


class Comparison(LightningModule):
    """Evaluates methods on the ``test`` split of a suite while it is set up; every process does, and all get the same.

    Args:
        recipe: how to merge: coefficient, search, experts, route.
        mergers: name -> method.
        lenient: leave out a method that refuses the suite, and say so, instead of ending with its error.
        variants: more rows, each a method and what is done otherwise than ``recipe`` and the data module say.
        seeds: draws of the proxy images, each with a seed of its own, over which the rows that see any are averaged.

    Attributes:
        results: what ``results.json`` holds, once the comparison has run.

    Raises:
        InputError: when two rows have one name, or there is to be no draw.
    """

    def __init__(
        self,
        recipe: Recipe,
        mergers: Mapping[str, Merger],
        lenient: bool = False,
        variants: Sequence[Variant] = (),
        seeds: int = 1,
    ) -> None:
        super().__init__()
        if twice := [row.name for row in variants if row.name in mergers]:
            raise InputError(f"`variants`: {twice[0]} is the name of one of `mergers` too; name it otherwise", of="command")
        if not 1 <= seeds <= _MOST_SEEDS:
            raise InputError(f"`seeds` must lie in 1 to {_MOST_SEEDS}, not {seeds}", of="command")
        self.recipe, self.rows, self.lenient, self.seeds = recipe, [*of_mergers(mergers), *variants], lenient, seeds
        self.results: dict[str, Any] = {}

    def prepare_data(self) -> None:
        """Download what will be read, in one process of each machine."""
        data = data_of(self.trainer)
        self._check_rows(data)
        data.fetch(self._needs(data))
        for name, other, needs in self._other_proxies(data):
            with _of_variant(name):
                other.fetch(needs)

    def setup(self, stage: str) -> None:
        """Evaluate the backbone, the experts and every method, and compare the experts with each other."""
        data, runtime = data_of(self.trainer), runtime_of(self.trainer)
        self._check(data, runtime.team)
        bench = Workbench.open(data, runtime)
        evaluator, experts = bench.evaluator, self.recipe.chosen(data.suite)
        check_lineage(self._merged_experts(data), bench.base, evaluator.encoder.linears)
        measuring = Measuring(bench)
        zero_shot = measuring.zero_shot()["accuracy"]
        own = {task: evaluator.expert_accuracy(task, TEST) for task in track(data.task_names, f"experts' own accuracy on {TEST}")}
        for text in departures(data.suite.tasks.values(), own):
            logger.warning(text)
        found, left_out = self._methods(measuring)
        kind = [*conditions.of_backbone(bench), *conditions.of_experts(evaluator, experts)]
        analysis = measuring.cache(entries.analysis(experts)).recall(
            [*kind, code_fingerprint([EnergyCurve, Workbench]) or ""],
            lambda: expert_analysis(bench.inputs({task: evaluator.expert(task) for task in experts})),
        )
        self.results = {
            "kind": "comparison",
            "schema": 1,
            **self._setting(bench),
            "rows": self._with_papers(data, table_rows(bench, zero_shot, own, found, self.recipe.chosen(data.suite))),
            "left_out": left_out,
            **analysis,
        }

    def predict_step(self, *args: Any) -> None:
        """Nothing: the trainer predicts on no images, so that it sets this module up and does no more."""

    def _needs(self, data: VisionTasks) -> Needs:
        """What the run reads; proxy images of variants apart. The analysis looks at some, if there are any."""
        needs = self.recipe.needs(frozenset({TEST}))
        everywhere = {*needs.everywhere, *(VAL for row in self.rows if row.scale == "search")}
        merged = {*self.recipe.tasks(data.suite), *(task for row in self.rows for task in self._tasks_of(row, data))}
        seeing = [] if self.lenient else [row for row in self.rows if not row.proxies and row.sees_proxies(self.recipe)]
        sure = data.suite.tasks if needs.judged is None else needs.judged
        judged = {*sure, *(task for row in seeing for task in self._tasks_of(row, data))}
        return replace(needs, everywhere=everywhere, proxies=True, judged=judged, merged=merged)

    def _tasks_of(self, row: Variant, data: VisionTasks) -> Collection[str]:
        """The tasks whose experts a row merges; none is opened."""
        return row.recipe(self.recipe, data.suite).tasks(data.suite)

    def _other_proxies(self, data: VisionTasks) -> Iterable[tuple[str, VisionTasks, Needs]]:
        """The data of variants whose proxy images are others than the run's, each once, with the first such variant's name."""
        others: dict[str, tuple[str, VisionTasks, set[str], set[str]]] = {}
        for row in self.rows:
            if row.proxies:
                other = row.data(data)
                *_, merged, judged = others.setdefault(repr(other.proxies), (row.name, other, set(), set()))
                merged.update(self._tasks_of(row, data))
                judged.update(self._tasks_of(row, data) if row.sees_proxies(self.recipe) and not self.lenient else ())
        return [
            (name, other, Needs(experts=False, proxies=True, judged=judged, merged=merged))
            for name, other, merged, judged in others.values()
        ]

    def _check(self, data: VisionTasks, team: Team) -> None:
        """Find what is wrong with the suite and with single rows before any long work starts."""
        needs = self._needs(data)
        data.check(needs)
        check_alike(data, needs, team)
        self._merged_experts(data)
        self._check_rows(data)
        for name, other, needs in self._other_proxies(data):
            with _of_variant(name):
                other.check(needs)

    def _check_rows(self, data: VisionTasks) -> None:
        """Refuse what needs no download to be found wrong."""
        self.recipe.check_routed(dynamic=not self.rows or any(row.merger.kind == "dynamic" for row in self.rows))
        for row in self.rows:
            images = row.data(data)
            if row.merger.kind == "dynamic":
                with _of_variant(row.name) if row.route else nullcontext():
                    row.recipe(self.recipe, data.suite).check_truth(self._tasks_of(row, data), images.task_names)

    def _with_papers(self, data: VisionTasks, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows with the papers' numbers, which are of all experts of a published suite."""
        suite = data.suite
        whole = set(self.recipe.chosen(suite)) == set(suite.tasks)
        return with_papers(rows, len(suite.tasks), published_numbers(suite) if whole else [])

    def _merged_experts(self, data: VisionTasks) -> dict[str, Expert]:
        """The experts that some row merges."""
        merged = {task for row in self.rows for task in self._tasks_of(row, data)}
        return {task: data.suite.experts[task] for task in data.suite.tasks if task in merged}

    def _methods(self, measuring: Measuring) -> tuple[list[Measured], dict[str, str]]:
        """What was measured of each method, and why others were left out."""
        found, left_out = list[Measured](), dict[str, str]()
        for number, row in enumerate(self.rows, start=1):
            place, before = f"[{number}/{len(self.rows)}] {row.name}", measuring.measured
            try:
                found.append(self._measured(measuring, row, place))
            except EvaluationError:
                raise
            except InputError as error:
                if not self.lenient:
                    raise
                left_out[row.name] = str(error)
                logger.info("%s is left out: %s", place, error)
                continue
            known = ", known from an earlier run" if measuring.measured == before else ""
            mean = 100 * fmean(found[-1].accuracy.values())
            logger.info("%s: %.2f %% on %s%s%s", place, mean, TEST, self._repeated(row), known)
        return found, left_out

    def _measured(self, measuring: Measuring, row: Variant, place: str) -> Measured:
        """One row: a draw of its proxy images after the other, or one run where it sees none."""
        run = measuring.bench.evaluator.data
        recipe, draws = row.recipe(self.recipe, run.suite), self.seeds if row.sees_proxies(self.recipe) else 1
        data = [row.data(run, draw) for draw in range(draws)]
        found = {
            images.proxies.seed: measuring.method(row.merger, recipe, images, f"{place}, draw {draw}" if draws > 1 else place)
            for draw, images in enumerate(data, start=1)
        }
        return Measured(row.name, found, settings(row, recipe, data[0]), differing(row))

    def _repeated(self, row: Variant) -> str:
        """How often a row was measured, where there is something to say of it."""
        if self.seeds == 1:
            return ""
        return f", mean of {self.seeds} draws" if row.sees_proxies(self.recipe) else ", once: it sees no proxy images"

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
            "expert_dtype": recipe.expert_dtype,
            "proxies": asdict(data.proxies),
            "draws": self.seeds,
            "seed": int(os.environ.get("PL_GLOBAL_SEED", "0")),
            "precision": runtime.precision_name,
            "device": runtime.device.type,
            "processes": runtime.team.size,
            "versions": versions(),
        }


@contextmanager
def _of_variant(name: str) -> Iterator[None]:
    """Say which variant an error is of."""
    try:
        yield
    except InputError as error:
        raise InputError(f"variant {name}: {error}", error.of) from error
