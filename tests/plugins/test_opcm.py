"""OPCM against its published recursion, written plainly in float64 with full SVDs."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from synthetic import Zoo, relative_error
from tolerances import of_formula, summed
from torch import Tensor
from updates import LIMIT, assert_updates, matrices, real_inputs

from mergekit_vision.errors import InputError
from mergekit_vision.merger import Merger
from mergekit_vision.plugins.opcm import OPCM


def norm(update: Mapping[str, Tensor]) -> float:
    return float(torch.cat([value.flatten() for value in update.values()]).norm())


def projected(delta: Tensor, merged: Tensor, alpha: float) -> Tensor:
    """A task vector in the full bases of the merged one, without the diagonal and the leading block."""
    U, S, Vh = torch.linalg.svd(merged)
    first = int((S.cumsum(0) / S.sum() > alpha).double().argmax())
    P = U.T @ delta @ Vh.T
    P.diagonal().fill_(0)
    P[:first, :first] = 0
    return U @ P @ Vh


def opcm(deltas: Mapping[str, Tensor], linear: set[str], order: list[int], alpha: float = 0.5) -> dict[str, Tensor]:
    """The whole model step by step, rescaled after each."""
    merged = {key: delta[order[0]] for key, delta in deltas.items()}
    norms, factor = [norm(merged)], 1.0
    for t in order[1:]:
        task = {key: delta[t] for key, delta in deltas.items()}
        norms.append(norm(task))
        mean = sum(norms) / len(norms)
        merged = {
            key: factor * merged[key] + (projected(task[key], merged[key], alpha) if key in linear else task[key]) for key in task
        }
        factor = norm(merged) / mean
        merged = {key: value / factor for key, value in merged.items()}
    return merged


def of_zoo(other: bool = False, alpha: float = 0.5, order: list[int] | None = None) -> Callable[[Zoo], dict[str, Tensor]]:
    def update(zoo: Zoo) -> dict[str, Tensor]:
        deltas = {key: zoo.delta64(key) for key in zoo.base}
        return opcm(deltas, matrices(zoo, other), order or list(range(zoo.tasks)), alpha)

    return update


@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 30])
def test_the_published_recursion(tasks: int) -> None:
    zoo = Zoo(tasks=tasks)
    merged = OPCM().merge(zoo.inputs())
    assert (merged.scale, merged.fixed) == (1.0, frozenset())
    assert_updates(merged.update, of_zoo(), zoo)


@pytest.mark.parametrize("split", [0.0, 0.2, 0.9])
@pytest.mark.parametrize("other", ["sum", "project"])
def test_options(split: float, other: str) -> None:
    zoo = Zoo(tasks=4)
    assert_updates(OPCM(split=split, other=other).merge(zoo.inputs()).update, of_zoo(other == "project", split), zoo)


def test_a_split_of_all_closes_all() -> None:
    """What published code, which looks for the first share above 1, takes for none."""
    zoo = Zoo(tasks=2)
    key = "visual.transformer.resblocks.0.attn.out_proj.weight"
    zoo.base = {key: zoo.base[key]}
    first = zoo.delta64(key)[0]
    assert relative_error(OPCM(split=1.0).merge(zoo.inputs()).update[key] / first.norm(), first / first.norm()) > 1e-3
    found = OPCM(split=1.0).merge(zoo.inputs()).update[key].double()
    assert relative_error(found / found.norm(), first / first.norm()) <= LIMIT, "a square matrix of full rank leaves no room"


def test_the_norm_is_the_mean_of_the_experts() -> None:
    zoo = Zoo(tasks=5)
    norms = [norm({key: zoo.delta64(key)[t] for key in zoo.base}) for t in range(5)]
    found = norm({key: value.double() for key, value in OPCM().merge(zoo.inputs()).update.items()})
    assert abs(found * 5 / sum(norms) - 1) <= summed(5)


def test_the_order_is_the_suites_or_drawn_from_the_seed() -> None:
    zoo, order = Zoo(tasks=4), [2, 0, 3, 1]
    assert_updates(OPCM().merge(zoo.inputs(order)).update, of_zoo(order=order), zoo)
    drawn = [OPCM(seed=seed).merge(zoo.inputs()).update for seed in (0, 0, 1)]
    assert all(drawn[0][key].equal(drawn[1][key]) for key in zoo.base)
    assert any(not drawn[0][key].equal(drawn[2][key]) for key in zoo.base)
    assert_updates(drawn[0], of_zoo(order=torch.randperm(4, generator=torch.Generator().manual_seed(0)).tolist()), zoo)


@pytest.mark.parametrize("seed", [-(2**63), 2**64 - 1])
def test_every_seed_of_the_range_is_one(seed: int) -> None:
    zoo = Zoo(tasks=2)
    assert OPCM(seed=seed).merge(zoo.inputs()).update.keys() == zoo.base.keys()


def test_what_no_expert_changed_is_left_out_and_what_the_first_did_not_change_is_merged() -> None:
    zoo = Zoo(tasks=3)
    key = "visual.transformer.resblocks.0.attn.out_proj.weight"
    for expert in zoo.experts.values():
        expert["visual.proj"] = zoo.base["visual.proj"].clone()
    zoo.experts["task0"][key] = zoo.base[key].clone()
    update = OPCM().merge(zoo.inputs()).update
    assert zoo.base.keys() - update.keys() == {"visual.proj"}
    deltas = zoo.delta64(key)
    expected = deltas[1] + projected(deltas[2], deltas[1], 0.5)
    found = update[key].double()
    assert relative_error(found / found.norm(), expected / expected.norm()) <= LIMIT


def test_experts_that_cancel_leave_nothing() -> None:
    zoo = Zoo(tasks=2)
    key = "visual.ln_post.weight"
    zoo.base = {key: torch.zeros(24)}
    zoo.experts = {"a": {key: torch.ones(24)}, "b": {key: -torch.ones(24)}}
    assert not OPCM().merge(zoo.inputs()).update[key].any()


def test_real_experts(zoo: Path) -> None:
    """Both of them: the more there are, the closer lie some singular values of the sum, whose vectors none knows then."""
    inputs = real_inputs(zoo, tasks=3)
    deltas = [inputs.deltas(key).double() for key in inputs.base]

    def formula(*deltas: Tensor) -> Tensor:
        found = opcm(dict(zip(inputs.base, deltas, strict=True)), set(inputs.base), [0, 1, 2])
        return torch.cat([value.flatten() for value in found.values()])

    update = OPCM(other="project").merge(inputs).update
    found = torch.cat([update[key].flatten() for key in inputs.base])
    assert relative_error(found, formula(*deltas)) <= of_formula(formula, *deltas)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: OPCM(split=-0.1), "split is -0.1"),
        (lambda: OPCM(split=50), "split is 50"),
        (lambda: OPCM(split=float("nan")), "split is nan"),
        (lambda: OPCM(other="mean"), "other is 'mean', but must be one of sum, project"),
        (lambda: OPCM(seed=2**64), "seed is 18446744073709551616, but must lie in"),
        (lambda: OPCM(seed=-(2**63) - 1), "seed is -9223372036854775809, but must lie in"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(make: Callable[[], Merger], named: str) -> None:
    with pytest.raises(InputError, match=f"OPCM: {named}"):
        make()
