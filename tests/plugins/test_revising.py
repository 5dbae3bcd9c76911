"""Experts that join or leave a merged model: the result of merging all again, by the formulas in float64 and by the merge."""

import math
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from plain import together
from synthetic import LINEARS, Zoo, relative_error, weight_key
from tolerances import eps, summed
from torch import Tensor
from updates import LIMIT, assert_updates, esm_formula, tsvm_formula, uneven

from mergekit_vision.errors import InputError
from mergekit_vision.merger import Former, Merged, MergeInputs, Merger, merged_weights
from mergekit_vision.merging.record import revisable
from mergekit_vision.plugins.average import Average
from mergekit_vision.plugins.esm import ESM
from mergekit_vision.plugins.opcm import OPCM
from mergekit_vision.plugins.regmean import RegMean
from mergekit_vision.plugins.task_arithmetic import TaskArithmetic
from mergekit_vision.plugins.ties import TIES
from mergekit_vision.plugins.tsvm import TSVM
from mergekit_vision.registry import mergers

NONE: list[int] = []
FROZEN = weight_key(LINEARS[2])


def subset(zoo: Zoo, order: list[int]) -> Zoo:
    """The same model with some of its experts."""
    other, names = copy(zoo), [list(zoo.experts)[i] for i in order]
    other.tasks, other.experts = len(order), {name: zoo.experts[name] for name in names}
    return other


def merged_before(zoo: Zoo, merger: Merger, order: list[int], keep: int = 0, scale: float | None = None) -> Former:
    """A model of some experts, as it is known from its float32 weights and what was kept."""
    merged = merger.merge(replace(zoo.inputs(order), keep=keep))
    return former(zoo, merged, order, merged.scale if scale is None else scale)


def former(zoo: Zoo, merged: Merged, order: list[int], scale: float) -> Former:
    weights = merged_weights(zoo.base, merged, scale)
    change = {key: weights[key] - value for key, value in zoo.base.items()}
    return Former(tuple(list(zoo.experts)[i] for i in order), change, scale, merged.kept)


def assert_weights(found: Merged, expected: Merged, zoo: Zoo, scale: float, bound: float) -> None:
    """Models have the same weights, up to so much of the largest weight of each parameter."""
    assert found.fixed == expected.fixed
    pairs = merged_weights(zoo.base, found, scale), merged_weights(zoo.base, expected, scale)
    for key in zoo.base:
        difference = (pairs[0][key] - pairs[1][key]).abs().max()
        assert difference <= bound * pairs[1][key].abs().max(), key


# --- sums


@pytest.mark.parametrize("merger", [Average(), TaskArithmetic()])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_sums_are_revised_by_the_model_alone(merger: Merger, scale: float | None) -> None:
    zoo = Zoo(tasks=6)
    before = merged_before(zoo, merger, [0, 1, 2, 3], scale=scale)
    assert revisable(merger) == "model"
    assert not before.kept
    found = merger.revise(before, zoo.inputs([4, 5]), zoo.inputs([1]))
    by_formula = {key: zoo.delta64(key)[[0, 2, 3, 4, 5]].sum(0) for key in zoo.base}
    if isinstance(merger, Average):
        by_formula = {key: value / 5 for key, value in by_formula.items()}
    for key, update in by_formula.items():
        exact = zoo.base[key].double() + before.scale * update
        weights = merged_weights(zoo.base, found, before.scale)[key]
        # the former model and this one are rounded once each, what joins and leaves as the task vectors are
        assert (weights - exact).abs().max() <= 4 * summed(6) * zoo.base[key].abs().max(), key
    assert found.scale == merger.merge(zoo.inputs()).scale


def test_of_a_model_at_coefficient_0_no_sum_is_known() -> None:
    zoo = Zoo(tasks=3)
    with pytest.raises(InputError, match="coefficient 0"):
        TaskArithmetic().revise(merged_before(zoo, TaskArithmetic(), [0, 1], scale=0.0), zoo.inputs([2]), zoo.inputs(NONE))


# --- directions


FORMULAS = [
    (TSVM(), tsvm_formula),
    (TSVM(rank=3, other="mean"), partial(tsvm_formula, rank=3, block=True)),
    (ESM(), esm_formula),
    *(
        pytest.param(ESM(**options, **own), partial(esm_formula, **options, **formula), marks=pytest.mark.slow)
        for options, own, formula in (
            ({"norm": "truncated", "out_proj": "esd", "other": "mean"}, {}, {}),
            ({"out_proj": "mean"}, {"rank": 5}, {"k": 5}),
        )
    ),
]
by_parts = pytest.mark.parametrize(("merger", "formula"), FORMULAS, ids=["TSVM", "TSVM-rank", "ESM", "ESM-norm", "ESM-rank"])


@by_parts
def test_an_expert_joins(merger: Merger, formula: Callable[[Zoo], Mapping[str, Tensor]]) -> None:
    """And then another one, by what was kept of the first time."""
    zoo = Zoo(tasks=5)
    before = merged_before(zoo, merger, [0, 1, 2], scale=0.5)
    assert revisable(merger) == "state"
    once = merger.revise(before, zoo.inputs([3]), zoo.inputs(NONE))
    twice = merger.revise(former(zoo, once, [0, 1, 2, 3], 0.5), zoo.inputs([4]), zoo.inputs(NONE))
    for found, tasks in ((once, 4), (twice, 5)):
        assert_updates(found.update, formula, subset(zoo, list(range(tasks))))
        again = merger.merge(zoo.inputs(list(range(tasks))))
        assert (found.fixed, found.scale) == (again.fixed, again.scale)
    assert zoo.asked == ({f"task{t}" for t in range(5)} if isinstance(merger, ESM) else set())


@by_parts
def test_an_expert_leaves_without_its_file(merger: Merger, formula: Callable[[Zoo], Mapping[str, Tensor]]) -> None:
    """So far as enough was kept: more directions count in a model of fewer experts."""
    zoo = Zoo(tasks=5)
    before = merged_before(zoo, merger, [0, 1, 2, 3, 4], keep=2)
    gone = replace(zoo.inputs([1, 4]), experts={"task1": {}, "task4": {}})
    assert_updates(merger.revise(before, zoo.inputs(NONE), gone).update, formula, subset(zoo, [0, 2, 3]))
    if merger == TSVM(rank=3, other="mean"):  # as many count in any model
        assert_updates(merger.revise(before, zoo.inputs(NONE), zoo.inputs([0, 1, 2])).update, formula, subset(zoo, [3, 4]))
        return
    with pytest.raises(InputError, match="enough for models of 3 and more, and 2 would be left"):
        merger.revise(before, zoo.inputs(NONE), zoo.inputs([0, 1, 2]))


@pytest.mark.parametrize("merger", [TSVM(rank="energy"), ESM(rank="energy")], ids=repr)
def test_directions_are_shared_out_anew_by_energy(merger: Merger) -> None:
    zoo = uneven(5)
    joined = merger.revise(merged_before(zoo, merger, [0, 1, 2]), zoo.inputs([3, 4]), zoo.inputs(NONE))
    assert_weights(joined, merger.merge(zoo.inputs()), zoo, joined.scale, LIMIT)
    left = merger.revise(former(zoo, joined, [0, 1, 2, 3, 4], joined.scale), zoo.inputs(NONE), zoo.inputs([1, 3, 4]))
    assert_weights(left, merger.merge(zoo.inputs([0, 2])), zoo, left.scale, LIMIT)


def test_as_many_join_as_leave() -> None:
    zoo = Zoo(tasks=5)
    found = ESM().revise(merged_before(zoo, ESM(), [0, 1, 2]), zoo.inputs([3, 4]), zoo.inputs([0, 2]))
    assert_updates(found.update, esm_formula, subset(zoo, [1, 3, 4]))


def test_keeping_changes_nothing_of_the_model_and_the_kept_is_no_more_than_is_needed() -> None:
    zoo = Zoo(tasks=4)
    for merger in (ESM(), TSVM(), RegMean(), OPCM()):
        plain, keeping = merger.merge(zoo.inputs()), merger.merge(replace(zoo.inputs(), keep=0))
        assert not plain.kept
        assert keeping.kept
        assert all(torch.equal(plain.update[key], value) for key, value in keeping.update.items())
    kept = TSVM().merge(replace(zoo.inputs(), keep=0)).kept
    shape = zoo.base[FROZEN].shape
    count = min(shape) // 4
    assert kept[f"task0/{FROZEN}/left"].shape == (shape[0], count)
    assert kept[f"task0/{FROZEN}/left"].untyped_storage().nbytes() == 8 * shape[0] * count


@pytest.mark.parametrize("merger", [TSVM(), ESM(), RegMean(gram="delta"), RegMean()], ids=repr)
def test_a_layer_that_only_some_changed(merger: Merger) -> None:
    """It is merged as soon as one who changed it joins, and stays as it was trained before and afterwards."""
    zoo = Zoo(tasks=4)
    for name in ("task0", "task1", "task2"):
        zoo.experts[name][FROZEN] = zoo.base[FROZEN].clone()
    before = merged_before(zoo, merger, [0, 1, 2], keep=0)
    assert not before.change[FROZEN].any()
    joined = merger.revise(before, zoo.inputs([3]), zoo.inputs(NONE))
    assert_weights(joined, merger.merge(zoo.inputs()), zoo, joined.scale, LIMIT)
    assert joined.update[FROZEN].any()
    left = merger.revise(former(zoo, joined, [0, 1, 2, 3], joined.scale), zoo.inputs(NONE), zoo.inputs([3]))
    assert FROZEN not in left.update or left.update[FROZEN].abs().max() <= LIMIT * joined.update[FROZEN].abs().max()


@pytest.mark.parametrize("merger", [TaskArithmetic(), ESM(), TSVM(), RegMean(), RegMean(gram="delta"), OPCM()], ids=repr)
def test_two_processes_revise_as_one(merger: Merger) -> None:
    zoo = Zoo(tasks=4)
    before, inputs = merged_before(zoo, merger, [0, 1, 2]), zoo.inputs([3])

    class Revised(Merger):
        def merge(self, inputs: MergeInputs) -> Merged:
            return merger.revise(before, inputs, replace(inputs, experts={}))

    alone = Revised().merge(inputs)
    for found in together(inputs, Revised(), False):
        for name in ("update", "kept"):
            ours, theirs = getattr(alone, name), getattr(found, name)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], value) for key, value in theirs.items())


# --- normal equations


@pytest.mark.parametrize(
    "options", [{}, {"shrink": 1.0, "ridge": 0.01}, {"gram": "delta"}, {"post_norm": "pretrained"}], ids=repr
)
def test_regmean(options: dict[str, object]) -> None:
    """Sums of float64 matrices: only the weights are rounded, of the averages also those of the model before."""
    zoo, merger = Zoo(tasks=5, images=60), RegMean(**options)
    before = merged_before(zoo, merger, [0, 1, 2, 3])
    joined = merger.revise(before, zoo.inputs([4]), zoo.inputs(NONE))
    assert_weights(joined, merger.merge(zoo.inputs()), zoo, 1.0, summed(5))
    left = merger.revise(former(zoo, joined, [0, 1, 2, 3, 4], 1.0), zoo.inputs(NONE), zoo.inputs([1]))
    assert_weights(left, merger.merge(zoo.inputs([0, 2, 3, 4])), zoo, 1.0, 2 * summed(5))


def test_regmean_behind_merged_blocks_is_not_revisable() -> None:
    assert revisable(RegMean(gram="merged")) == "no"


# --- OPCM


@pytest.mark.parametrize("scale", [0.8, -0.8])
def test_opcm_takes_the_next_task_vector(scale: float) -> None:
    """As if it had come last from the start: of what it adds to, the weights' rounding alone is lost."""
    zoo = Zoo(tasks=4)
    before = merged_before(zoo, OPCM(), [2, 0, 1], scale=scale)
    found = OPCM().revise(before, zoo.inputs([3]), zoo.inputs(NONE))
    expected = OPCM().merge(replace(zoo.inputs([2, 0, 1, 3]), keep=0))
    for key in zoo.base:
        rounding = eps() * zoo.base[key].norm() / (0.8 * before.change[key].norm())
        assert relative_error(found.update[key], expected.update[key].double()) <= 100 * rounding, key
    for name, value in expected.kept.items():
        assert math.isclose(found.kept[name], value, rel_tol=1e-5), name
    assert revisable(OPCM(seed=1)) == "no"
    with pytest.raises(InputError, match="no expert can leave"):
        OPCM().revise(before, zoo.inputs(NONE), zoo.inputs([2]))


def test_opcm_on_a_model_of_another_method() -> None:
    """Its sum is taken for one of orthogonal task vectors as long as the next, and the update keeps its norm."""
    zoo = Zoo(tasks=4)
    before = replace(merged_before(zoo, TIES(), [0, 1, 2]), scale=1.0)
    found = OPCM().revise(before, zoo.inputs([3]), zoo.inputs(NONE))

    def norm(tensors: Mapping[str, Tensor]) -> float:
        return float(torch.cat([value.flatten().double() for value in tensors.values()]).norm())

    assert math.isclose(norm(found.update), norm(before.change), rel_tol=1e-5)
    new = {key: zoo.delta64(key)[3] for key in zoo.base}
    key = "visual.ln_post.weight"  # no matrix: all of it is added
    total = before.change[key] * (3**0.5 * norm(new) / norm(before.change)) + new[key]
    direction = found.update[key].double()
    assert relative_error(direction / direction.norm(), total / total.norm()) <= LIMIT
    assert not found.kept
    zoo.experts["task3"] = dict(zoo.base)
    with pytest.raises(InputError, match="there is nothing to add"):
        OPCM().revise(before, zoo.inputs([3]), zoo.inputs(NONE))


# --- what was kept


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda kept: kept.pop("fewest"), "lacks for how many it is enough"),
        (lambda kept: kept.update({f"task0/{FROZEN}/left": torch.zeros(2, 3)}), f"does not fit the model: task0, {FROZEN}"),
        (lambda kept: kept.pop(f"task1/{FROZEN}/norm"), "does not fit the model: task1"),
        (lambda kept: kept.update({"task9/visual.proj/whole": torch.zeros(3)}), "does not fit the model: task9"),
        (lambda kept: kept.update({f"task0/{FROZEN}/whole": torch.zeros(2, 3)}), f"does not fit the model: task0, {FROZEN}"),
        (lambda kept: kept.update({"x": torch.zeros(3)}), "does not fit the model"),
    ],
)
def test_what_does_not_fit_is_refused(spoil: Callable[[dict[str, Tensor]], object], said: str) -> None:
    zoo = Zoo(tasks=3)
    before = merged_before(zoo, ESM(), [0, 1])
    kept = dict(before.kept)
    spoil(kept)
    with pytest.raises(InputError, match=said):
        ESM().revise(replace(before, kept=kept), zoo.inputs([2]), zoo.inputs(NONE))


def test_a_method_that_inherits_and_merges_otherwise_is_not_revised() -> None:
    class Half(TSVM):
        def merge(self, inputs: MergeInputs) -> Merged:
            return Merged({key: value / 2 for key, value in super().merge(inputs).update.items()})

    assert revisable(Half()) == "no"
    assert {name for name, merger in mergers().items() if revisable(merger()) != "no"} == {
        *("Average", "TaskArithmetic", "TSVM", "ESM", "RegMean", "OPCM")
    }
