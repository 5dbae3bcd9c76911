"""RegMean and its family against the formulas in float64; what goes block by block, against whole runs from the images."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from plain import Counted, Plain, Subject, Weights, added, together
from synthetic import LINEARS, Zoo, weight_key
from tolerances import assert_near, from_gram
from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.functional.esd import RowGram
from mergekit_vision.functional.regression import NULL, Normal, of_inputs, semidefinite_solve, solved
from mergekit_vision.merger import LinearInfo, Merger
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.plugins.regmean import RegMean

BLOCKS = [weight_key(linear) for linear in LINEARS]


@pytest.fixture(params=["made up, T=1", "made up, T=3", "made up, T=9", "tiny"])
def subject(request: pytest.FixtureRequest) -> Subject:
    if request.param == "tiny":
        return Subject(request.getfixturevalue("bench"))
    return Subject(Zoo(tasks=int(request.param[-1]), images=60))


def fitted(weights: list[Tensor], grams: list[Tensor], base: Tensor, shrink: float, ridge: float) -> Tensor:
    """The formula of the paper, about the weights themselves, then their change."""
    grams = [shrink * G + (1 - shrink) * torch.diag(G.diagonal()) for G in grams]
    total, size = torch.stack(grams).sum(0), len(grams[0])
    pull = ridge * total.trace() / size * torch.eye(size, dtype=torch.float64)
    right = sum(W @ G for W, G in zip(weights, grams, strict=True)) + base @ pull
    return right @ torch.linalg.inv(total + pull) - base  # type: ignore[no-any-return]


def rows(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def formula(plain: Plain, linears: tuple[LinearInfo, ...], *, gram: str, shrink: float, ridge: float) -> Weights:
    """The update of the whole model."""
    keys, found = [linear.weight for linear in linears], Weights()
    for key in plain.base:
        if key not in keys:
            found[key] = torch.stack(plain.delta(key)).mean(0)
    for linear in linears:
        grams = []
        for task, expert in plain.experts.items():
            if gram == "delta":
                delta = plain.deltas[task][linear.weight]
                grams.append(delta.T @ delta / delta.square().sum())
                continue
            weights = expert
            if gram == "merged":  # before this block the merged model, whatever comes after it
                inside = {key: value for key, value in plain.deltas[task].items() if f"resblocks.{linear.block}." in key}
                weights = added(plain.base, {**found, **inside})
            X = rows(plain.inputs(task, weights, [linear])[linear.name])
            grams.append(X.T @ X / len(X))
        own = [expert[linear.weight] for expert in plain.experts.values()]
        found[linear.weight] = fitted(own, grams, plain.base[linear.weight], shrink, ridge)
    return found


@pytest.mark.parametrize("gram", ["experts", "merged", "delta"])
@pytest.mark.parametrize(("shrink", "ridge"), [(0.95, 0.0), (0.5, 0.1), (1.0, 0.01), (0.0, 0.0)])
def test_regmean(subject: Subject, gram: str, shrink: float, ridge: float) -> None:
    merged = RegMean(gram=gram, shrink=shrink, ridge=ridge).merge(subject.inputs)
    assert not merged.scalable
    subject.check(merged.update, partial(formula, linears=subject.linears, gram=gram, shrink=shrink, ridge=ridge))


@pytest.mark.parametrize("gram", ["experts", "merged"])
@pytest.mark.parametrize("rotate", [False, True])
def test_two_processes_find_what_one_does(gram: str, rotate: bool) -> None:
    inputs, merger = Zoo(tasks=3).inputs(), RegMean(gram=gram)
    alone = merger.merge(inputs).update
    for found in together(inputs, merger, rotate):
        assert found.update.keys() == alone.keys()
        assert all(torch.equal(found.update[key], value) for key, value in alone.items())


def test_each_block_is_run_once_a_task(bench: Workbench) -> None:
    """And once more behind the merged blocks before it."""
    inputs = bench.inputs(bench.evaluator.data.suite.experts)
    for gram, runs in (("experts", 2 * 3), ("merged", 2 * 3 + 3)):
        counted = Counted(inputs.blocks)
        RegMean(gram=gram).merge(replace(inputs, streams=counted))
        assert (counted.embeddings, counted.blocks) == (3, runs)


def test_without_inputs_no_proxies_are_needed() -> None:
    inputs = replace(Zoo(tasks=3).inputs(), run_proxies=None, streams=None)
    assert RegMean(gram="delta").merge(inputs).update
    for gram in ("experts", "merged"):
        with pytest.raises(InputError, match="proxy images"):
            RegMean(gram=gram).merge(inputs)


def test_the_last_normalization_may_stay_pretrained() -> None:
    """As in the published code of RegMean++, which loads no other weights behind the blocks."""
    zoo = Zoo(tasks=3)
    mean, pretrained = (RegMean(post_norm=post_norm).merge(zoo.inputs()).update for post_norm in ("mean", "pretrained"))
    assert mean.keys() - pretrained.keys() == {"visual.ln_post.weight"}
    assert all(torch.equal(mean[key], value) for key, value in pretrained.items())


def test_identical_experts_merge_into_that_expert() -> None:
    """With ``shrink`` 1 as with any other, so long as the inputs determine the weights."""
    zoo = Zoo(tasks=3, images=60)
    zoo.experts = dict.fromkeys(zoo.experts, zoo.experts["task0"])
    for gram in ("experts", "merged", "delta"):
        update = RegMean(gram=gram).merge(zoo.inputs()).update
        for key in zoo.base:
            expected = zoo.delta64(key)[0]
            assert (update[key].double() - expected).norm() < 1e-5 * expected.norm(), key


def test_few_images_give_the_smallest_change_that_explains_them() -> None:
    """LOT Merging: the pseudo-inverse, and no change in directions in which no input lies."""
    zoo = Zoo(tasks=2, images=4)
    update = RegMean(shrink=1.0).merge(zoo.inputs()).update
    key, name = BLOCKS[-1], LINEARS[-1]
    grams, seen = [], []
    for task, expert in zoo.experts.items():
        inputs = Subject(zoo).plain().inputs(task, {k: v.double() for k, v in expert.items()}, [zoo.inputs().linears[-1]])[name]
        X = rows(inputs)
        grams.append(X.T @ X)
        seen.append(X)
    deltas, G = zoo.delta64(key), torch.stack(grams).sum(0)
    expected = sum(delta @ H for delta, H in zip(deltas, grams, strict=True)) @ torch.linalg.pinv(G, hermitian=True, rtol=NULL)
    assert torch.linalg.matrix_rank(G, hermitian=True) < len(G), "the inputs say it all: the test tests nothing"
    blind = torch.linalg.svd(torch.cat(seen))[2][2 * 4 * 5 :]
    assert (update[key].double() - expected).norm() < 1e-4 * expected.norm()
    assert (update[key].double() @ blind.T).norm() < 1e-5 * update[key].norm()


def test_channels_of_any_size_are_solved_as_well_as_others() -> None:
    """What counts is the condition of the inputs with each channel scaled to one, and how far the outputs are off."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-9, 3, 12, dtype=torch.float64)
    X = torch.randn(200, 12, dtype=torch.float64, generator=generator) * sizes
    delta = torch.randn(7, 12, dtype=torch.float64, generator=generator)
    inputs = RowGram()
    with pytest.raises(ValueError, match="no layer inputs"):
        of_inputs(inputs, delta)
    inputs(X)
    found = solved(of_inputs(inputs, delta))
    assert_near(found * sizes, delta * sizes, from_gram(float(torch.linalg.cond(X / sizes))) * 12)


def test_a_semidefinite_system_is_solved_in_its_range() -> None:
    A = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    G, target = A.T @ A, (A.T @ A)[:, :2]
    torch.testing.assert_close(semidefinite_solve(G, target), torch.linalg.pinv(G, hermitian=True) @ target)
    assert not semidefinite_solve(torch.zeros_like(G), torch.zeros_like(target)).any()
    assert not solved(Normal(torch.zeros_like(G), torch.zeros_like(target)), ridge=0.1).any()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: RegMean(gram="inputs"), "gram"),
        (lambda: RegMean(post_norm="base"), "post_norm"),
        (lambda: RegMean(shrink=1.5), "shrink"),
        (lambda: RegMean(ridge=-1), "ridge"),
        (lambda: RegMean(ridge=float("nan")), "ridge"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(make: Callable[[], Merger], named: str) -> None:
    with pytest.raises(InputError, match=f": {named} is "):
        make()
