"""The choice of a method's parameters without labels: each combination is merged once, and judged by the experts."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from lightning.pytorch import LightningModule

from mergekit_vision.data.checks import Needs
from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.data.proxies import Proxies
from mergekit_vision.merger import Merger
from mergekit_vision.merging.agreement import ExpertTeachers
from mergekit_vision.merging.lineage import check_lineage
from mergekit_vision.merging.recipe import Recipe, expert_paths, halves
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.runs import conditions, entries
from mergekit_vision.runs.checks import check_alike, check_is_merge
from mergekit_vision.runs.entries import Entry
from mergekit_vision.runs.grids import Grid, as_content, grid_rows
from mergekit_vision.runs.runtime import data_of, runtime_of
from mergekit_vision.support.cache import Cache
from mergekit_vision.support.console import logger
from mergekit_vision.support.source_code import code_fingerprint, versions


class Tuning(LightningModule):
    """Judges a method with every combination of some parameters by its agreement with the experts, while it is set up.

    No label is read. Where a method sees proxy images, it sees half of every task's and is judged by the others. What was judged
    once is remembered by its content.

    Args:
        recipe: how to merge: coefficient, search, experts, route.
        merger: the method; its parameters are those that ``grid`` does not name.
        grid: parameter -> values to try.

    Attributes:
        rows: the combinations.
        results: what ``results.json`` holds, once all combinations have been judged; the best combination comes first.

    Raises:
        InputError: when the grid is not one of the method, or that is no merge.
    """

    def __init__(self, recipe: Recipe, merger: Merger, grid: Grid) -> None:
        super().__init__()
        self.recipe, self.grid, self.rows = recipe, grid, grid_rows(merger, grid)
        self.results: dict[str, Any] = {}
        for row in self.rows:
            check_is_merge(row.merger)

    def prepare_data(self) -> None:
        """Download what will be read, in one process of each machine."""
        self._check_arguments()
        data_of(self.trainer).fetch(self._needs())

    def setup(self, stage: str) -> None:
        """Judge every combination."""
        self._check_arguments()
        data, runtime = data_of(self.trainer), runtime_of(self.trainer)
        seen, judging = halves(data, [row.merger for row in self.rows])
        judging.check(self._needs())
        check_alike(data, self._needs(), runtime.team)
        experts = self.recipe.chosen(data.suite)
        bench = Workbench.open(data, runtime)
        check_lineage(experts, bench.base, bench.evaluator.encoder.linears)
        judge, found = _Judge(self.recipe, bench.on(seen), bench.on(judging)), []
        for number, row in enumerate(self.rows, start=1):
            place = f"[{number}/{len(self.rows)}] {row.name}"
            logger.info("%s …", place)
            entry = judge(row.merger)
            logger.info("%s: agreement with the experts %.2f %%", place, 100 * entry["share"])
            found.append({"name": row.name, "values": dict(row.values), "content": as_content(row.merger), **entry})
        self.results = self._results(data, sorted(found, key=lambda row: row["distance"]))

    def predict_step(self, *args: Any) -> None:
        """Nothing, as a :class:`~mergekit_vision.runs.comparison.Comparison`'s."""

    def _check_arguments(self) -> None:
        """Refuse what needs no download to be found wrong."""
        self.recipe.tasks(data_of(self.trainer).suite)
        self.recipe.check_routed(dynamic=any(row.merger.kind == "dynamic" for row in self.rows))

    def _needs(self) -> Needs:
        return replace(self.recipe.needs(), proxies=True, judged=self.recipe.experts)

    def _results(self, data: VisionTasks, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        suite, recipe = data.suite, self.recipe
        shown = [{key: value for key, value in row.items() if key != "content"} for row in rows]
        return {
            "kind": "tuning",
            "schema": 1,
            "suite": suite.name,
            "backbone": suite.backbone,
            "pretrained": suite.pretrained,
            "experts": expert_paths(suite, recipe.chosen(suite)),
            "merger": rows[0]["merger"]["name"],
            "grid": {name: list(values) for name, values in self.grid.items()},
            "scale": recipe.scale,
            "search": asdict(recipe.search) if isinstance(recipe.scale, str) else None,
            "route": recipe.route,
            "expert_dtype": recipe.expert_dtype,
            "proxies": asdict(data.proxies),
            "rows": shown,
            "winner": self._configuration(rows[0], data.proxies),
            "versions": versions(),
        }

    def _configuration(self, best: Mapping[str, Any], proxies: Proxies) -> dict[str, Any]:
        """A configuration file of ``merge`` with the best combination; it sees all proxy images."""
        searched = best["scale"] if best["search"] else "merger"
        scale = searched if isinstance(self.recipe.scale, str) else self.recipe.scale
        experts = None if self.recipe.experts is None else list(self.recipe.experts)
        same = {"route": self.recipe.route, "expert_dtype": self.recipe.expert_dtype}
        model = {"merger": best["content"], "scale": scale, "experts": experts, **same}
        return {"model": model, "data": {"proxies": asdict(proxies)}}


class _Judge:
    """Merges with some parameters, chooses the coefficient, and asks the experts; what was asked once is remembered.

    Args:
        recipe: how to merge.
        seen: with the proxy images that methods see.
        judging: with those that they are judged by.
    """

    def __init__(self, recipe: Recipe, seen: Workbench, judging: Workbench) -> None:
        self._recipe, self._seen, self._judging = recipe, seen, judging
        suite = judging.evaluator.data.suite
        self._experts = recipe.chosen(suite)
        self._teachers = ExpertTeachers(judging.evaluator, list(self._experts))
        self._conditions = [
            "tuning",
            code_fingerprint([Tuning]) or "",
            *conditions.of_backbone(judging),
            *conditions.of_evaluation(judging.evaluator, None),
            *conditions.of_experts(seen.evaluator, self._experts),
            *conditions.of_experts(judging.evaluator, self._experts),
            *conditions.of_recipe(judging.evaluator, recipe),
        ]

    def __call__(self, merger: Merger) -> Entry:
        """What is found of a method."""
        code = conditions.of_merger(merger)
        parts = None if code is None else [*self._conditions, *code]
        cache = Cache("comparisons", entries.judged(self._experts), self._judging.evaluator.runtime.team)
        return cache.recall(parts, lambda: self._found(merger))

    def _found(self, merger: Merger) -> Entry:
        model = self._recipe.merge(self._seen, merger, self._judging)
        start, backbone = time.perf_counter(), self._teachers.backbone
        routed = model.weights, model.routed, list(self._experts), self._recipe.route
        with self._judging.evaluator.with_model(*routed) as evaluator:
            agreement = self._teachers.agreement(evaluator)
        return {
            "merger": model.record["merger"],
            "scale": model.record["scale"],
            "search": model.record["search"],
            "agreement": agreement.classes,
            "share": agreement.share,
            "distance": agreement.distance,
            "below_backbone": [task for task, share in agreement.classes.items() if share < backbone.classes[task]],
            "seconds": {**model.record["seconds"], "judge": round(time.perf_counter() - start, 3)},
        }
