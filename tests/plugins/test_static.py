"""Every plugin against its published formula in float64, on whole (small) models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import formulas
import pytest
import torch
from safetensors.torch import load_file
from synthetic import INFOS, LINEARS, Adapter, Zoo, relative_error, weight_key
from tolerances import of_formula, of_model, summed
from updates import esm_formula, is_matrix, tsvm_formula, uneven

from mergekit_vision.errors import InputError
from mergekit_vision.merger import MergeInputs, Merger, Weights
from mergekit_vision.plugins.average import Average
from mergekit_vision.plugins.esm import ESM
from mergekit_vision.plugins.task_arithmetic import TaskArithmetic
from mergekit_vision.plugins.ties import TIES
from mergekit_vision.plugins.tsvm import TSVM

TASKS = [3, 4, 8]


@pytest.fixture(scope="module", params=TASKS, ids=lambda tasks: f"T={tasks}")
def synthetic(request: pytest.FixtureRequest) -> Zoo:
    return Zoo(tasks=request.param)


def identical(tasks: int) -> Zoo:
    """One expert, ``tasks`` times."""
    zoo = Zoo(tasks=tasks)
    expert, rows = zoo.experts["task0"], zoo.layer_inputs["task0"]
    zoo.experts, zoo.layer_inputs = dict.fromkeys(zoo.experts, expert), dict.fromkeys(zoo.experts, rows)
    return zoo


# --- Average and task arithmetic


def test_average_and_task_arithmetic(synthetic: Zoo) -> None:
    average, arithmetic = Average().merge(synthetic.inputs()), TaskArithmetic().merge(synthetic.inputs())
    assert (average.scale, arithmetic.scale) == (1.0, 0.3)
    for key in synthetic.base:
        assert relative_error(average.update[key], synthetic.delta64(key).mean(0)) < summed(synthetic.tasks)
        assert relative_error(arithmetic.update[key], synthetic.delta64(key).sum(0)) < summed(synthetic.tasks)


# --- TIES


def flat(zoo: Zoo) -> torch.Tensor:
    return torch.cat([zoo.delta64(key).flatten(1) for key in zoo.base], 1)


@pytest.mark.parametrize("aggregate", ["mean", "sum", "max"])
@pytest.mark.parametrize("percent", [20, 100])
def test_ties(synthetic: Zoo, aggregate: str, percent: int) -> None:
    merged = TIES(density=percent / 100, aggregate=aggregate).merge(synthetic.inputs())
    found = torch.cat([merged.update[key].flatten() for key in synthetic.base])
    expected = formulas.ties(flat(synthetic), percent, aggregate)
    assert relative_error(found, expected) < summed(synthetic.tasks)
    assert ((found != 0) == (expected != 0)).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_ties_gives_exact_cancellations_the_majority_sign_of_the_whole_model(sign: int) -> None:
    """Experts on a coarse grid cancel exactly, here and there, before the majority is known."""
    zoo = Zoo(tasks=4, seed=2)
    for expert in zoo.experts.values():
        for key, base in zoo.base.items():
            zoo.base[key] = base.mul(256).round().div(256)
            expert[key] = zoo.base[key] + (expert[key] - base).mul(128).round().div(128) + sign / 128
    expected = formulas.ties(flat(zoo), 100, "mean")
    zero_sum = flat(zoo).sum(0) == 0
    assert (expected[zero_sum] * sign > 0).any(), "nothing cancels: the test tests nothing"
    found = torch.cat([value.flatten() for value in TIES(density=1.0).merge(zoo.inputs()).update.values()])
    assert relative_error(found, expected) < summed(zoo.tasks)


class Differing(dict[str, torch.Tensor]):
    """An expert that is stored as its differences to the backbone."""

    def __init__(self, base: Weights, changes: Weights) -> None:
        super().__init__({key: base[key] + changes[key] for key in base})
        self.difference = lambda key: changes[key].clone()


@pytest.mark.parametrize("others", [("task0",), ("task2",), ("task0", "task1", "task2")])
@pytest.mark.parametrize("stored", ["adapter", "differences"])
def test_ties_of_other_experts_beside_whole_weights(others: Sequence[str], stored: str) -> None:
    zoo = Zoo(tasks=3)
    for seed, task in enumerate(others):
        adapter = Adapter(zoo.base, seed)
        changes = {key: adapter[key] - zoo.base[key] for key in zoo.base}
        zoo.experts[task] = adapter if stored == "adapter" else Differing(zoo.base, changes)
    inputs = zoo.inputs()
    expected = TIES().merge(inputs.view(lambda task, key, delta: delta)).update  # all as task vectors
    assert all(torch.equal(update, expected[key]) for key, update in TIES().merge(inputs).update.items())


def test_stored_differences_are_the_task_vectors() -> None:
    """Their rounding errors as weights, of full rank, are none of them."""
    zoo = Zoo(tasks=2)
    changes = [{key: 1e-6 * value for key, value in zoo.experts[task].items()} for task in zoo.experts]
    zoo.experts = {task: Differing(zoo.base, change) for task, change in zip(zoo.experts, changes, strict=True)}
    inputs = zoo.inputs()
    for key in zoo.base:
        assert torch.equal(inputs.delta("task0", key), changes[0][key])
        expected = changes[0][key].double() + changes[1][key].double()
        assert torch.equal(inputs.total(key), expected)
        end, start = inputs.pair("task1", key)
        assert torch.equal(end - start, changes[1][key])
        assert inputs.changed("task0", key)
        assert not inputs.is_whole("task0", key)


def test_ties_counts_frozen_entries() -> None:
    zoo = Zoo(tasks=3)
    frozen = 5000
    padded = torch.cat([flat(zoo), torch.zeros(3, frozen, dtype=torch.float64)], 1)
    update = TIES(count_frozen=frozen).merge(zoo.inputs()).update
    found, expected = torch.cat([update[key].flatten() for key in zoo.base]), formulas.ties(padded, 20, "mean")[:-frozen]
    assert relative_error(found, expected) < summed(zoo.tasks)


# --- TSV-M


def check(found: Mapping[str, torch.Tensor], formula: Callable[[Zoo], Mapping[str, torch.Tensor]], zoo: Zoo) -> None:
    """Compare an update with a formula, as closely as float32 can know it."""
    expected, bounds = formula(zoo), of_model(formula, zoo)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if value.any():
            assert relative_error(found[key], value) < bounds[key], key
        else:
            assert not found[key].any(), key


def test_tsvm(synthetic: Zoo) -> None:
    merged = TSVM().merge(synthetic.inputs())
    assert (merged.scale, merged.fixed) == (1.0, frozenset())
    check(merged.update, tsvm_formula, synthetic)


def test_tsvm_options(synthetic: Zoo) -> None:
    merged = TSVM(rank=2, other="mean").merge(synthetic.inputs())
    check(merged.update, lambda zoo: tsvm_formula(zoo, rank=2, block=True), synthetic)


@pytest.mark.parametrize("floor", [0.0, 0.25, 1.0])
def test_tsvm_by_energy(floor: float) -> None:
    zoo = uneven(4)
    merged = TSVM(rank="energy", floor=floor).merge(zoo.inputs())
    check(merged.update, lambda zoo: tsvm_formula(zoo, floor=floor), zoo)


class LowRank(dict[str, torch.Tensor]):
    """Weights of an expert whose changes of the Linear layers are products of known factors."""

    def __init__(self, base: Mapping[str, torch.Tensor], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shapes = {key: base[key].shape for key in map(weight_key, LINEARS)}
        pairs = {
            key: (torch.randn(d, 2, generator=generator), torch.randn(2, i, generator=generator))
            for key, (d, i) in shapes.items()
        }
        self.pairs = {key: (1e-3 * up, down) for key, (up, down) in pairs.items()}
        super().__init__(base)
        self.update({key: base[key] + up @ down for key, (up, down) in self.pairs.items()})

    def factors(self, key: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        return self.pairs.get(key)


def test_tsvm_of_adapters_has_no_part_in_the_rounding_of_weights() -> None:
    """The differences of float32 weights have full rank, whose singular vectors weigh as much as those of the factors."""
    zoo = Zoo(tasks=3)
    experts = {f"task{t}": LowRank(zoo.base, t) for t in range(3)}
    inputs = replace(zoo.inputs(), experts=experts)
    update = TSVM().merge(inputs).update
    assert update.keys() == experts["task0"].pairs.keys()
    for key in update:
        exact = torch.stack([expert.pairs[key][0].double() @ expert.pairs[key][1].double() for expert in experts.values()])
        assert relative_error(update[key], formulas.tsvm(exact, 2)) < of_formula(partial(formulas.tsvm, k=2), exact), key
        rounded = torch.stack([expert[key] - zoo.base[key] for expert in experts.values()]).double()
        assert relative_error(update[key], formulas.tsvm(rounded)) > 1e-3, key
        assert relative_error(inputs.deltas(key), exact) < summed(2), key
        assert torch.equal(inputs.deltas(key)[1], inputs.delta("task1", key)), key


def test_tsvm_of_changed_adapters_is_that_of_the_changed_task_vectors() -> None:
    zoo = Zoo(tasks=3)
    experts = {f"task{t}": LowRank(zoo.base, t) for t in range(3)}
    inputs = replace(zoo.inputs(), experts=experts).view(lambda task, key, delta: 2 * delta)
    assert inputs.factors("task0", INFOS[0].weight) is None
    plain, doubled = TSVM().merge(replace(inputs, change=None)).update, TSVM().merge(inputs).update
    assert all(relative_error(doubled[key], 2 * plain[key]) < 1e-5 for key in plain)


def test_tsvm_may_leave_the_average_unscaled(synthetic: Zoo) -> None:
    scaled, fixed = TSVM().merge(synthetic.inputs()), TSVM(scale_average=False).merge(synthetic.inputs())
    assert not scaled.fixed
    assert fixed.fixed == {key for key in synthetic.base if not is_matrix(synthetic, key)}
    assert all(torch.equal(scaled.update[key], fixed.update[key]) for key in synthetic.base)


def test_tsvm_on_real_experts(zoo: Path) -> None:
    names = ("mnist", "kmnist", "gtsrb", "dtd10", "flowers5")
    experts = {name: load_file(zoo / "experts" / f"{name}.safetensors") for name in names}
    layers = ("0.attn.in_proj_weight", "3.attn.out_proj.weight", "1.mlp.c_fc.weight", "5.mlp.c_proj.weight")
    keys = ["visual.proj", "visual.positional_embedding", *(f"visual.transformer.resblocks.{layer}" for layer in layers)]
    backbone = load_file(zoo / "base" / "open_clip_model.safetensors")
    inputs = MergeInputs({key: backbone[key] for key in keys}, experts)
    merged = TSVM().merge(inputs)
    for key in keys:
        deltas = inputs.deltas(key).double()
        assert relative_error(merged.update[key], formulas.tsvm(deltas)) < of_formula(formulas.tsvm, deltas), key


# --- ESM


def check_esm(merger: ESM, zoo: Zoo, **options: Any) -> None:
    check(merger.merge(zoo.inputs()).update, lambda zoo: esm_formula(zoo, **options), zoo)


@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 7, 8])
def test_esm(tasks: int) -> None:
    """T below 4 asks for more directions than there are; 7 does not divide the widths."""
    check_esm(ESM(), Zoo(tasks=tasks))


@pytest.mark.parametrize("floor", [0.0, 0.25, 1.0])
def test_esm_by_energy(floor: float) -> None:
    check_esm(ESM(rank="energy", floor=floor), uneven(5), floor=floor)


def test_esm_constants() -> None:
    own = ESM(eigenvalue_power=0.5, inter_task=1.5, inter_dimension=0.7, inter_layer=1.1, gain=3.0, rank=4, norm="truncated")
    options = {"power": 0.5, "task": 1.5, "dimension": 0.7, "inter_layer": 1.1, "gain": 3.0, "k": 4, "norm": "truncated"}
    check_esm(own, Zoo(tasks=5), **options)


@pytest.mark.parametrize("out_proj", ["tsvm", "esd", "mean"])
@pytest.mark.parametrize("other", ["tsvm", "mean"])
def test_esm_options(out_proj: str, other: str) -> None:
    check_esm(ESM(out_proj=out_proj, other=other), Zoo(tasks=4), out_proj=out_proj, other=other)


@pytest.mark.parametrize("rank", [None, 6])
def test_esm_in_the_directions_of_an_svd(rank: int | None) -> None:
    """They are those of ESD on inputs that favor no direction; no proxy image is looked at."""
    found = ESM(directions="svd", rank=rank).merge(replace(Zoo(tasks=4).inputs(), run_proxies=None)).update
    white = Zoo(tasks=4)
    for rows in white.layer_inputs.values():
        rows.update({linear: torch.eye(value.shape[-1])[None] for linear, value in rows.items()})
    check(found, partial(esm_formula, k=rank), white)


def test_esm_fixes_all_but_the_essential_keys() -> None:
    merged = ESM().merge(Zoo(tasks=4).inputs())
    essential = {weight_key(linear) for linear in LINEARS if not linear.endswith("out_proj")}
    assert merged.scale == 1.0
    assert merged.update.keys() - merged.fixed == essential
    with_out_proj = ESM(out_proj="esd").merge(Zoo(tasks=4).inputs())
    assert with_out_proj.update.keys() - with_out_proj.fixed == {weight_key(linear) for linear in LINEARS}


def test_esm_gain_is_a_reparametrization_of_the_scale() -> None:
    zoo = Zoo(tasks=4)
    once, twice = ESM().merge(zoo.inputs()), ESM(gain=4.0).merge(zoo.inputs())
    for key in zoo.base:
        a, b = once.update[key] * once.coefficient(key, 0.8), twice.update[key] * twice.coefficient(key, 0.4)
        assert relative_error(a, b.double()) <= summed(2), "factors, of which each rounds once"


def test_esm_does_not_depend_on_the_size_of_the_proxy_batches() -> None:
    whole, parts = (ESM().merge(Zoo(tasks=4, batch=batch).inputs()).update for batch in (40, 3))
    bounds = of_model(esm_formula, Zoo(tasks=4))
    for key in whole:
        assert relative_error(parts[key], whole[key].double()) <= bounds[key]


def test_esm_needs_proxy_images() -> None:
    zoo = Zoo(tasks=2)
    with pytest.raises(InputError, match="proxy images"):
        ESM().merge(replace(zoo.inputs(), run_proxies=None))


def test_esm_with_a_layer_that_only_some_tasks_changed() -> None:
    """An expert without a task vector is not run for that layer, and has no part in the result."""
    zoo = Zoo(tasks=4)
    frozen, key = LINEARS[2], weight_key(LINEARS[2])
    zoo.experts["task1"][key] = zoo.base[key].clone()
    del zoo.layer_inputs["task1"][frozen]
    found = ESM(inter_task=0, inter_layer=0, rank=6).merge(zoo.inputs()).update[key]

    def formula(deltas: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
        return formulas.esm(deltas, list(rows), task=0, k=6)

    inputs = zoo.delta64(key)[[0, 2, 3]], *(zoo.rows(task, frozen) for task in ("task0", "task2", "task3"))
    assert relative_error(found, formula(*inputs)) < of_formula(formula, *inputs)


# --- sanity of all


@pytest.mark.parametrize("merger", [Average(), TIES(density=1.0), TIES(density=1.0, aggregate="max")])
def test_identical_experts_merge_into_that_expert(merger: Merger) -> None:
    zoo = identical(tasks=3)
    for key, value in merger.merge(zoo.inputs()).update.items():
        assert relative_error(value, zoo.delta64(key)[0]) < summed(3)


def test_task_arithmetic_of_identical_experts_is_their_multiple() -> None:
    zoo = identical(tasks=3)
    for key, value in TaskArithmetic().merge(zoo.inputs()).update.items():
        assert relative_error(value, 3 * zoo.delta64(key)[0]) < summed(3)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: TIES(density=0), "density"),
        (lambda: TIES(density=20), "density"),
        (lambda: TIES(aggregate="median"), "aggregate"),
        (lambda: TIES(count_frozen=-1), "count_frozen"),
        (lambda: TIES(count_frozen=float("nan")), "count_frozen"),
        (lambda: TSVM(rank=0), "rank"),
        (lambda: TSVM(rank="all"), "rank"),
        (lambda: TSVM(rank="energy", floor=1.5), "floor"),
        (lambda: TSVM(other="sum"), "other"),
        (lambda: ESM(eigenvalue_power=-1), "eigenvalue_power"),
        (lambda: ESM(inter_layer=float("nan")), "inter_layer"),
        (lambda: ESM(gain=float("inf")), "gain"),
        (lambda: ESM(rank=0), "rank"),
        (lambda: ESM(rank=4.0), "rank"),
        (lambda: ESM(rank="energy", floor=float("nan")), "floor"),
        (lambda: ESM(norm="full"), "norm"),
        (lambda: ESM(out_proj="none"), "out_proj"),
        (lambda: ESM(other="esd"), "other"),
        (lambda: ESM(directions="pca"), "directions"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(make: Callable[[], Merger], named: str) -> None:
    with pytest.raises(InputError, match=f": {named} is "):
        make()
