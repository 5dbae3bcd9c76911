"""CART against its formula, written plainly in float64 with full SVDs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from synthetic import Zoo, relative_error
from tolerances import of_formula, summed
from torch import Tensor
from updates import LIMIT, assert_updates, matrices, real_inputs

from mergekit_vision.errors import InputError
from mergekit_vision.merger import MergeInputs, Merger
from mergekit_vision.plugins.average import Average
from mergekit_vision.plugins.cart import CART


def cart(deltas: Tensor, gain: float = 2.3, share: float = 0.08) -> Tensor:
    """Task vectors about their mean, truncated and added to it."""
    mean = deltas.mean(0)
    k, merged = max(1, int(share * min(mean.shape))), mean.clone()
    for delta in deltas:
        U, S, Vh = torch.linalg.svd(delta - mean, full_matrices=False)
        merged += gain * U[:, :k] @ torch.diag(S[:k]) @ Vh[:k]
    return merged


def of_zoo(other: bool = False, **options: float) -> Callable[[Zoo], dict[str, Tensor]]:
    """The merged update of a whole model."""

    def update(zoo: Zoo) -> dict[str, Tensor]:
        deltas, low_rank = {key: zoo.delta64(key) for key in zoo.base}, matrices(zoo, other)
        return {key: cart(deltas[key], **options) if key in low_rank else deltas[key].mean(0) for key in zoo.base}

    return update


@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 30])
def test_the_published_formula(tasks: int) -> None:
    zoo = Zoo(tasks=tasks)
    assert_updates(CART().merge(zoo.inputs()).update, of_zoo(), zoo)


@pytest.mark.parametrize("options", [{"gain": 0.7}, {"share": 0.5}, {"gain": 1.0, "share": 1.0}])
def test_options(options: dict[str, float]) -> None:
    zoo = Zoo(tasks=5)
    assert_updates(CART(**options).merge(zoo.inputs()).update, of_zoo(**options), zoo)
    other = CART(other="low_rank", **options).merge(zoo.inputs())
    assert_updates(other.update, of_zoo(other=True, **options), zoo)


def test_no_scaling_coefficient_reaches_it() -> None:
    """The coefficient is that of the second term alone, and a parameter."""
    merged = CART().merge(Zoo(tasks=3).inputs())
    assert merged.scale == 1.0
    assert merged.fixed == merged.update.keys()
    assert not merged.scalable


@pytest.mark.parametrize("tasks", [1, 2])
def test_one_or_two_experts_are_averaged(tasks: int) -> None:
    """Two experts differ from their average by opposites."""
    zoo = Zoo(tasks=tasks)
    average = Average().merge(zoo.inputs()).update
    for key, value in CART(gain=5.0, other="low_rank").merge(zoo.inputs()).update.items():
        assert relative_error(value, average[key].double()) <= summed(tasks), key


def test_all_of_the_differences_add_up_to_nothing() -> None:
    zoo = Zoo(tasks=4)
    for key, value in CART(share=1.0).merge(zoo.inputs()).update.items():
        assert relative_error(value, zoo.delta64(key).mean(0)) <= summed(4), key


def test_what_no_expert_changed_is_left_out() -> None:
    zoo = Zoo(tasks=2)
    for expert in zoo.experts.values():
        expert["visual.proj"] = zoo.base["visual.proj"].clone()
    assert zoo.base.keys() - CART().merge(zoo.inputs()).update.keys() == {"visual.proj"}


def test_real_experts(zoo: Path) -> None:
    inputs: MergeInputs = real_inputs(zoo)
    for key, value in CART(other="low_rank").merge(inputs).update.items():
        deltas = inputs.deltas(key).double()
        assert relative_error(value, cart(deltas)) <= min(of_formula(cart, deltas), LIMIT), key


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: CART(gain=-1), "gain is -1"),
        (lambda: CART(gain=float("inf")), "gain is inf"),
        (lambda: CART(share=0), "share is 0"),
        (lambda: CART(share=8), "share is 8"),
        (lambda: CART(share=float("nan")), "share is nan"),
        (lambda: CART(other="base"), "other is 'base', but must be one of mean, low_rank"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(make: Callable[[], Merger], named: str) -> None:
    with pytest.raises(InputError, match=f"CART: {named}"):
        make()
