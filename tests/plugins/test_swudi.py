"""SWUDI against WUDI's objective: the flow along its gradient, step by step, and Adam's published loop."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from synthetic import LINEARS, Zoo, relative_error, weight_key
from tolerances import of_formula, summed
from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.functional.swudi import swudi_merge
from mergekit_vision.merger import Merger
from mergekit_vision.plugins.swudi import SWUDI

BLOCKS = [weight_key(linear) for linear in LINEARS]


def objective(merged: Tensor, deltas: Tensor) -> Tensor:
    """What WUDI-Merging minimizes."""
    return sum(((merged - delta) @ delta.T).square().sum() / delta.square().sum() for delta in deltas)  # type: ignore[return-value]


def flow(deltas: Tensor, time: float, share: float = 1.0) -> Tensor:
    """The closed form as it is written down: through the pseudo-inverse, which holds no information about null directions."""
    S = sum(delta.T @ delta / delta.square().sum() for delta in deltas)
    B = sum(delta @ delta.T @ delta / delta.square().sum() for delta in deltas)
    start = deltas.sum(0)
    values, Q = torch.linalg.eigh(S)
    kept = round(share * len(values))
    gains = 1 - torch.exp(-time / values.mean() * values)
    gains[: len(values) - kept] = 0
    return start + (B @ torch.linalg.pinv(S, hermitian=True, rtol=1e-13) - start) @ Q @ torch.diag(gains) @ Q.T


@pytest.mark.parametrize("tasks", [1, 3, 8])
@pytest.mark.parametrize(("time", "share"), [(0.3, 1.0), (3.0, 0.5), (100.0, 0.25), (300.0, 1.0)])
def test_swudi(tasks: int, time: float, share: float) -> None:
    zoo = Zoo(tasks=tasks)
    merged = SWUDI(time=time, share=share).merge(zoo.inputs())
    assert (merged.scale, merged.update.keys() - merged.fixed) == (1.0, set(BLOCKS))
    for key in zoo.base:
        deltas = zoo.delta64(key)
        if key in BLOCKS:
            bound = of_formula(partial(flow, time=time, share=share), deltas)
            assert bound < 1e-5
            assert relative_error(merged.update[key], flow(deltas, time, share)) < bound, key
        else:
            assert relative_error(merged.update[key], deltas.mean(0)) < summed(tasks), key


def test_it_is_gradient_descent_with_many_small_steps() -> None:
    """By automatic differentiation of the objective; the error of ``n`` steps falls with ``1 / n``."""
    deltas = Zoo(tasks=4).delta64(BLOCKS[2])
    mean = float(sum(delta.square().sum() / delta.square().sum() for delta in deltas)) / deltas.shape[2]  # of S's eigenvalues
    exact, errors = swudi_merge(deltas, time=2.0), []
    for steps in (200, 400):
        merged = deltas.sum(0)
        for _ in range(steps):
            merged = merged.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(objective(merged, deltas), merged)
            merged = merged - 2.0 / mean / steps / 2 * gradient
        errors.append(relative_error(merged.detach(), exact))
    assert errors[0] < 0.01
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.05)


def test_a_long_time_finds_the_minimum() -> None:
    """Wherever the tasks write at all: with them, the spectrum ends before the width does."""
    deltas = torch.randn(2, 30, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = swudi_merge(deltas, time=1e9)
    found.requires_grad_()
    (gradient,) = torch.autograd.grad(objective(found, deltas), found)
    start = deltas.sum(0).requires_grad_()
    (before,) = torch.autograd.grad(objective(start, deltas), start)
    assert gradient.norm() < 1e-9 * before.norm()


def test_tasks_without_a_task_vector_have_no_part() -> None:
    zoo = Zoo(tasks=3)
    expected = SWUDI().merge(Zoo(tasks=3).inputs()).update[BLOCKS[0]]
    zoo.experts["nothing"] = dict(zoo.base)
    assert torch.equal(SWUDI().merge(zoo.inputs()).update[BLOCKS[0]], expected)
    zeros = torch.zeros(2, 4, 3)
    assert not swudi_merge(zeros, time=1.0).any()
    with pytest.raises(ValueError, match="no task vectors"):
        swudi_merge([], time=1.0)


def test_the_rest_may_stay() -> None:
    assert SWUDI(other="base").merge(replace(Zoo(tasks=3).inputs(), run_proxies=None, streams=None)).update.keys() == set(BLOCKS)


def adam(deltas: Tensor, rate: float, steps: int = 300) -> Tensor:
    """WUDI-Merging's loop, its gradient through ``d_in x d_in`` matrices."""
    S = sum(delta.T @ delta / delta.square().sum() for delta in deltas)
    B = sum(delta @ delta.T @ delta / delta.square().sum() for delta in deltas)
    merged = deltas.sum(0).requires_grad_()
    optimizer = torch.optim.Adam([merged], lr=rate)
    for _ in range(steps):
        merged.grad = 2 * (merged.detach() @ S - B)
        optimizer.step()
    return merged.detach()


@pytest.mark.parametrize("layer", ["0.attn.in_proj_weight", "3.attn.out_proj.weight"])
def test_the_default_goes_as_far_as_the_published_loop_does(zoo: Path, layer: str) -> None:
    """On real experts. Adam's steps are all of one size, so that how far it comes depends on how large task vectors are.

    Published are 300 steps of 1e-5, for experts fine-tuned at that rate; these were at 3e-4.
    """
    key, names = f"visual.transformer.resblocks.{layer}", ("mnist", "kmnist", "gtsrb", "dtd10", "flowers5")
    base = load_file(zoo / "base" / "open_clip_model.safetensors")[key]
    deltas = torch.stack([load_file(zoo / "experts" / f"{name}.safetensors")[key] - base for name in names]).double()
    start, found = objective(deltas.sum(0), deltas), objective(swudi_merge(deltas, SWUDI().time, SWUDI().share), deltas)
    loops = [objective(adam(deltas.float(), rate).double(), deltas) for rate in (1e-5, 1e-4)]
    assert loops[1] < 1.2 * found, "about as far as the larger rate"
    assert found < loops[0] < start


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: SWUDI(time=0), "time"),
        (lambda: SWUDI(time=float("inf")), "time"),
        (lambda: SWUDI(share=0), "share"),
        (lambda: SWUDI(share=16), "share"),
        (lambda: SWUDI(other="tsvm"), "other"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(make: Callable[[], Merger], named: str) -> None:
    with pytest.raises(InputError, match=f": {named} is "):
        make()
