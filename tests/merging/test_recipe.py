"""What is merged and how: chosen experts, what a run needs, and the record of a merge."""

import math
from pathlib import Path

import pytest
import torch
from tiny import TASKS

import mergekit_vision.checkpoints
import mergekit_vision.encoders.backbone
from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.errors import InputError
from mergekit_vision.evaluation.evaluator import Runtime
from mergekit_vision.merger import Merged, MergeInputs, Merger, merged_weights
from mergekit_vision.merging.recipe import Recipe
from mergekit_vision.merging.scaling import ScaleSearch
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.plugins.esm import ESM
from mergekit_vision.plugins.esmpp import ESMPP
from mergekit_vision.plugins.smile import SMILE
from mergekit_vision.plugins.task_arithmetic import TaskArithmetic
from mergekit_vision.plugins.ties import TIES
from mergekit_vision.suites.suite import Suite


@pytest.mark.parametrize("scale", [math.inf, -math.inf, math.nan, 1e30, -65505.0, 10**400])
def test_a_coefficient_that_is_no_number_is_refused(scale: float) -> None:
    with pytest.raises(InputError, match=r"`scale` is .*, but must be a finite number") as caught:
        Recipe(scale)
    assert caught.value.of == "model"
    with pytest.raises(InputError, match="`scale` is 'serch', but must be a number, "):
        Recipe("serch")


def test_a_run_needs_val_everywhere_where_it_searches() -> None:
    for recipe, searched in ((Recipe(), set()), (Recipe(0.5), set()), (Recipe("search"), {"val"})):
        needs = recipe.needs(frozenset({"test"}))
        assert (set(needs.evaluated), set(needs.everywhere)) == ({"test"}, searched)
        assert needs.experts


@pytest.mark.parametrize(
    ("scale", "merger", "images"),
    [
        ("merger", TIES(), False),
        ("search", TIES(), False),
        ("agreement", TIES(), True),
        ("merger", ESM(), True),
        ("merger", ESMPP(base=TIES()), True),
        ("merger", SMILE(), False),
        ("merger", SMILE(rule="sim"), True),
    ],
)
def test_a_run_needs_proxy_images_where_method_or_coefficient_do(scale: str, merger: Merger, images: bool) -> None:
    for experts in (None, ("grays",)):
        needs = Recipe(scale, experts=experts).needs(mergers=[merger])
        assert needs.proxies == images
        assert needs.judged == (experts if images else ())
        assert needs.proxies_of(TASKS) == (list(experts or TASKS) if images else [])


def test_experts_are_chosen_in_the_order_that_is_asked_for(tiny_suite: Path) -> None:
    suite = Suite.load(tiny_suite)
    assert list(Recipe().chosen(suite)) == list(TASKS)
    chosen = Recipe(experts=("stripes", "colors")).chosen(suite)
    assert {task: weights.path for task, weights in chosen.items()} == {
        task: suite.tasks[task].expert.path for task in ("stripes", "colors")
    }
    for experts, named in ((("gray",), r"\['gray'\]"), ((), r"\[\]")):
        with pytest.raises(
            InputError, match=f"`experts` {named}: name some of the suite's tasks, colors, grays, stripes"
        ) as caught:
            Recipe(experts=experts).chosen(suite)
        assert caught.value.of == "model"


def test_a_merged_model_that_overflows_is_refused(bench: Workbench) -> None:
    with pytest.raises(InputError, match=r"^Huge at coefficient 60000: visual\.proj holds .* above 65504") as caught:
        Recipe(6e4).merge(bench, Huge())
    assert str(caught.value).endswith("; take a smaller `scale`, or leave out the expert it comes from")
    assert caught.value.of == "model"
    Recipe(60.0).merge(bench, TaskArithmetic())


class Huge(TaskArithmetic):
    """As if one parameter had been fine-tuned until it diverged."""

    def merge(self, inputs: MergeInputs) -> Merged:
        return Merged({"visual.proj": torch.full_like(inputs.base["visual.proj"], 2.0)})


@pytest.mark.parametrize("part", ["up", "router"])
def test_experts_with_nan_are_refused(bench: Workbench, part: str) -> None:
    class Spoiled(SMILE):
        def merge(self, inputs: MergeInputs) -> Merged:
            merged = super().merge(inputs)
            experts = next(iter(merged.routed.values()))
            (experts.up if part == "up" else experts.router.basis).view(-1)[0] = torch.nan
            return merged

    with pytest.raises(InputError, match=rf"^Spoiled at coefficient 1: visual\..*in_proj\.{part}.* holds NaN or infinity"):
        Recipe().merge(bench, Spoiled(rank=2, gate_rank=1))


def test_the_model_is_the_backbone_plus_the_scaled_update(bench: Workbench) -> None:
    experts = ("colors", "stripes")
    model = Recipe(0.7, experts=experts).merge(bench, TaskArithmetic())
    suite = bench.evaluator.data.suite
    merged = bench.merge(TaskArithmetic(), {task: suite.experts[task] for task in experts})
    expected = merged_weights(bench.base, merged, 0.7)
    assert model.weights.keys() == expected.keys() == bench.base.keys()
    assert all(torch.equal(value, expected[key]) for key, value in model.weights.items())
    assert model.routed == {}


def test_the_record_says_what_was_merged_and_how(bench: Workbench) -> None:
    record = (
        Recipe("search", ScaleSearch(halvings=0), experts=("stripes", "grays")).merge(bench, ESMPP(base=TIES(), rank=2)).record
    )
    assert (record["suite"], record["pretrained"]) == ("tiny", None)
    assert record["backbone"] == bench.evaluator.data.suite.backbone
    assert record["experts"] == {"stripes": "experts/stripes.safetensors", "grays": "experts/grays.pt"}
    assert record["merger"]["name"] == "ESMPP"
    assert record["citation"] == [ESMPP.paper, TIES.paper]
    coefficients = [row["coefficient"] for row in record["search"]]
    assert coefficients == sorted(coefficients)
    assert record["scale"] == max(record["search"], key=lambda row: (row["normalized"], -row["coefficient"]))["coefficient"]
    assert record["seconds"].keys() == {"merge", "search"}
    assert all(seconds > 0 for seconds in record["seconds"].values())


@pytest.mark.parametrize("method", [TaskArithmetic(), ESMPP(rank=2)], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize(("scale", "evaluates"), [("merger", False), (0.5, False), ("search", True)])
def test_files_are_opened_once_and_heads_built_only_for_a_search(
    tiny_suite: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: TaskArithmetic | ESMPP,
    scale: float | str,
    evaluates: bool,
) -> None:
    opened: list[Path] = []
    loaded: list[str] = []
    expert, clip = mergekit_vision.checkpoints.open_expert, mergekit_vision.encoders.backbone.load_clip
    monkeypatch.setattr("mergekit_vision.suites.suite.open_expert", lambda at: opened.append(at.path) or expert(at))
    monkeypatch.setattr(
        "mergekit_vision.merging.workbench.load_clip", lambda name, tag=None: loaded.append(name) or clip(name, tag)
    )
    data = VisionTasks(str(tiny_suite))
    bench = Workbench.open(data, Runtime(torch.device("cpu")))
    recipe = Recipe(scale, ScaleSearch(halvings=0))
    data.check(recipe.needs())
    recipe.merge(bench, method)
    assert sorted(opened) == sorted(task.expert.path for task in data.suite.tasks.values())
    assert loaded == [data.suite.backbone]
    assert (cache / "heads").exists() == evaluates
