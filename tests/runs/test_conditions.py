"""What results depend on: whatever changes a result changes its conditions, and nothing else does."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import changed
from tiny import TASKS, write_parquet

from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.data.proxies import Proxies
from mergekit_vision.evaluation.evaluator import Runtime
from mergekit_vision.merger import Merged, MergeInputs, Merger
from mergekit_vision.merging.recipe import Recipe
from mergekit_vision.merging.scaling import ScaleSearch
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.plugins.esmpp import ESMPP
from mergekit_vision.plugins.ties import TIES
from mergekit_vision.runs.conditions import of_backbone, of_evaluation, of_experts, of_merger, of_recipe

CPU = torch.device("cpu")


def test_conditions_of_a_method_are_its_parameters_and_those_of_its_base() -> None:
    known = [TIES(), TIES(density=0.3), ESMPP(), ESMPP(base=TIES()), ESMPP(base=TIES(density=0.3))]
    assert len({tuple(of_merger(merger) or ()) for merger in known}) == len(known)
    assert of_merger(TIES()) == of_merger(TIES())


def test_a_method_whose_code_cannot_be_read_is_not_remembered() -> None:
    space: dict[str, Any] = {"__name__": "nowhere", "Merger": Merger, "Merged": Merged, "MergeInputs": MergeInputs}
    exec("class Typed(Merger):\n    def merge(self, inputs): return Merged({})", space)
    assert of_merger(space["Typed"]()) is None


class Hidden(Merger):
    """Keeps its parameter under another name."""

    def __init__(self, gain: float = 1.0) -> None:
        self._gain = gain

    def merge(self, inputs: MergeInputs) -> Merged:
        return Merged({})


@dataclass(frozen=True, slots=True)
class Slotted(Merger):
    """Keeps its parameter in a slot."""

    gain: float | Merger = 1.0

    def merge(self, inputs: MergeInputs) -> Merged:
        return Merged({})


def test_results_are_not_taken_for_those_of_other_parameters() -> None:
    known = [Slotted(0.0), Slotted(1.0), Slotted(TIES()), Slotted(TIES(density=0.3))]
    assert len({tuple(of_merger(merger) or ()) for merger in known}) == len(known)
    assert of_merger(Hidden(0.0)) is of_merger(Slotted(Hidden(1.0))) is None, "what cannot be told is not remembered"


def opened(suite: Path | str, **data: Any) -> Workbench:
    return Workbench.open(VisionTasks(str(suite), **data), Runtime(CPU))


def test_a_backbone_is_its_weights_wherever_it_lies(tiny_suite: Path, root: Path) -> None:
    bench = opened(tiny_suite)
    assert of_backbone(bench) == of_backbone(opened(root / "suite.yaml"))
    bench.base["visual.proj"][0, 0] += 1
    assert of_backbone(bench) != of_backbone(opened(root / "suite.yaml"))


def test_an_evaluation_is_its_images_heads_and_precision(tiny_suite: Path, root: Path) -> None:
    evaluator = opened(tiny_suite).evaluator
    plain = of_evaluation(evaluator, "test")
    assert of_evaluation(opened(root / "suite.yaml").evaluator, "test") == plain
    others = [
        of_evaluation(evaluator, "val"),
        of_evaluation(replace(evaluator, runtime=Runtime(CPU, precision_name="bf16-mixed")), "test"),
        of_evaluation(opened(tiny_suite, tasks=["grays"]).evaluator, "test"),
        of_evaluation(opened(changed(root, lambda tasks: tasks["grays"].update(templates=["{}"]))).evaluator, "test"),
    ]
    write_parquet(root / "data" / "grays" / "test.parquet", "grays", TASKS["grays"][0], 41, seed=99)
    changed(root, lambda tasks: tasks["grays"].update(templates=list(TASKS["grays"][1])))
    others.append(of_evaluation(opened(root / "suite.yaml").evaluator, "test"))
    assert len({tuple(found) for found in (plain, *others)}) == 6


@pytest.mark.parametrize(
    "change",
    [
        lambda tasks: tasks["grays"].update(expert="experts/colors.safetensors"),
        lambda tasks: tasks["grays"]["data"].update(val=tasks["grays"]["data"]["test"]),
        lambda tasks: tasks["grays"]["data"].pop("val"),
    ],
)
def test_experts_are_their_files_and_proxy_images(
    tiny_suite: Path, root: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    def conditions(suite: Path | str, **data: Any) -> list[str]:
        evaluator = opened(suite, **data).evaluator
        return of_experts(evaluator, Recipe().chosen(evaluator.data.suite))

    plain = conditions(tiny_suite)
    assert conditions(root / "suite.yaml") == plain
    assert conditions(tiny_suite, proxies=Proxies(n=9)) != plain
    assert conditions(changed(root, change)) != plain


def test_the_order_of_the_experts_counts(bench: Workbench) -> None:
    chosen = [Recipe(experts=order).chosen(bench.evaluator.data.suite) for order in (("grays", "colors"), ("colors", "grays"))]
    assert of_experts(bench.evaluator, chosen[0]) != of_experts(bench.evaluator, chosen[1])


def test_a_recipe_is_its_coefficient_its_route_and_what_it_is_searched_on(bench: Workbench, root: Path) -> None:
    recipes = [
        Recipe(),
        Recipe(1.0),
        Recipe(0.7),
        Recipe(route="oracle"),
        Recipe("search"),
        Recipe("search", ScaleSearch(halvings=1)),
    ]
    found = [tuple(of_recipe(bench.evaluator, recipe)) for recipe in recipes]
    assert len(set(found)) == len(found)
    assert of_recipe(bench.evaluator, Recipe(search=ScaleSearch(halvings=1))) == list(found[0]), "nothing is searched"
    write_parquet(root / "data" / "grays" / "val.parquet", "grays", TASKS["grays"][0], 37, seed=99)
    elsewhere = opened(root / "suite.yaml").evaluator
    assert of_recipe(elsewhere, Recipe()) == list(found[0])
    assert of_recipe(elsewhere, Recipe("search")) != list(found[4])
