"""DC-Merge against its formula, written plainly in float64 with full SVDs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from formulas import matrix, polar_svd
from synthetic import Zoo, relative_error
from tolerances import assert_near, of_formula
from torch import Tensor
from updates import LIMIT, assert_updates, matrices, real_inputs

from mergekit_vision.errors import InputError
from mergekit_vision.functional.dc import dc_merge, smoothed
from mergekit_vision.merger import Merger
from mergekit_vision.plugins.dc import DCMerge


def dc(deltas: Tensor, density: float = 1e-3, rank: int | None = None, ratio: float | None = None) -> Tensor:
    """The published code's steps, in coordinates that are padded with zeros to the full rank."""
    T, o, i = deltas.shape
    r = min(o, i)
    k, width = (r // T, r) if rank is None else (rank, T * rank)
    U, V, truncated = deltas.new_zeros(o, width), deltas.new_zeros(width, i), []
    for t, delta in enumerate(deltas):
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        s = s[:k]
        if ratio is not None:
            even = torch.linspace(min(ratio, float(s[0] / s[-1])), 1, k).double()
            s = s.sum() * even / even.sum()
        U[:, t * k : (t + 1) * k], V[t * k : (t + 1) * k] = u[:, :k], vh[:k]
        truncated.append(u[:, :k] @ torch.diag(s) @ vh[:k])
    A, B = polar_svd(U)[0], polar_svd(V)[0].T
    kept = []
    for delta in truncated:
        M = A.T @ delta @ B
        M[M.abs() < 1e-12 * M.abs().max()] = 0  # zero, where the arithmetic is exact
        threshold = M.abs().flatten().sort(descending=True).values[max(1, int(density * M.numel())) - 1]
        kept.append(torch.where(M.abs() >= threshold, M, torch.zeros_like(M)))
    total, merged = sum(kept), torch.zeros(width, width, dtype=deltas.dtype)
    for t in range(T):
        block = slice(t * k, (t + 1) * k)
        agreeing = [torch.where(M.sign() == total.sign(), M, torch.zeros_like(M))[block, block] for M in kept]
        merged[block, block] = sum(agreeing) / sum((M != 0).double() for M in agreeing).clamp(min=1)
    return A @ merged @ B.T


def of_zoo(other: bool = True, **options: float) -> Callable[[Zoo], dict[str, Tensor]]:
    """The merged update of a whole model; zero where there are more tasks than directions."""

    def update(zoo: Zoo) -> dict[str, Tensor]:
        found, spectral = {}, matrices(zoo, other)
        for key, base in zoo.base.items():
            deltas = zoo.delta64(key)
            if key not in spectral:
                found[key] = deltas.mean(0)
            elif "rank" not in options and min(base.shape) < zoo.tasks:
                found[key] = torch.zeros_like(deltas[0])
            else:
                found[key] = dc(deltas, **options)
        return found

    return update


@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 30])
def test_the_published_formula(tasks: int) -> None:
    zoo = Zoo(tasks=tasks)
    merged = DCMerge().merge(zoo.inputs())
    assert (merged.scale, merged.fixed) == (1.0, frozenset())
    assert_updates(merged.update, of_zoo(), zoo)


@pytest.mark.parametrize("density", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("tasks", [3, 7])
def test_the_density(density: float, tasks: int) -> None:
    """The default keeps a single coordinate of matrices as small as these; 7 divides no side."""
    zoo = Zoo(tasks=tasks)
    assert_updates(DCMerge(density=density).merge(zoo.inputs()).update, of_zoo(density=density), zoo)


@pytest.mark.parametrize("smoothing", [1.0, 1.5, 5.0])
def test_the_settings_for_low_rank_experts(smoothing: float) -> None:
    zoo = Zoo(tasks=3)
    merged = DCMerge(rank=4, smoothing=smoothing, density=0.1, other="mean").merge(zoo.inputs())
    assert_updates(merged.update, of_zoo(other=False, rank=4, ratio=smoothing, density=0.1), zoo)


def test_the_average_may_be_left_unscaled() -> None:
    zoo = Zoo(tasks=2)
    for other in ("dc", "mean"):
        merged = DCMerge(other=other, scale_average=False).merge(zoo.inputs())
        assert merged.update.keys() - merged.fixed == matrices(zoo, other == "dc")


def test_what_no_expert_changed_is_left_out_and_what_one_did_not_change_is_merged() -> None:
    zoo = Zoo(tasks=3)
    key = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    for expert in zoo.experts.values():
        expert["visual.proj"] = zoo.base["visual.proj"].clone()
    zoo.experts["task1"][key] = zoo.base[key].clone()
    merged = DCMerge(rank=8, density=0.05).merge(zoo.inputs())
    assert zoo.base.keys() - merged.update.keys() == {"visual.proj"}
    found, others = merged.update[key], zoo.delta64(key)[[0, 2]]
    # one triplet less in the coordinates of all, whose number the share is of
    kept = int(0.05 * 24**2) / 16**2 + 1e-9
    assert relative_error(found, dc(others, rank=8, density=kept)) <= LIMIT


def test_real_experts(zoo: Path) -> None:
    inputs = real_inputs(zoo)
    for key, value in DCMerge().merge(inputs).update.items():
        deltas = inputs.deltas(key).double()
        assert relative_error(value, dc(deltas)) <= min(of_formula(dc, deltas), LIMIT), key


# --- the math


def test_tasks_in_directions_of_their_own_are_kept_whole() -> None:
    first, second = torch.zeros(2, 10, 8, dtype=torch.float64)
    first[:5, :4], second[5:, 4:] = matrix(5, 4, 10.0, 1), matrix(5, 4, 10.0, 2)
    assert_near(dc_merge(torch.stack([first, second]), density=1.0), first + second, 1e-10)


def test_opposite_experts_merge_into_nothing() -> None:
    M = matrix(12, 9, cond=10.0)
    deltas = torch.stack([M, -M])
    assert float(dc_merge(deltas, density=1.0).norm()) <= 1e-10 * float(M.norm())


def test_smoothing_keeps_the_sum_and_never_steepens() -> None:
    S = torch.tensor([6.0, 3.0, 2.0, 1.0])
    assert_near(smoothed(S, 1.0), torch.full((4,), 3.0), 1e-6)
    assert_near(smoothed(S, 2.0), torch.tensor([4.0, 10 / 3, 8 / 3, 2.0]), 1e-6)
    assert_near(smoothed(S, 100.0), smoothed(S, 6.0), 1e-6)
    assert len(smoothed(S[:0], 2.0)) == 0
    assert_near(smoothed(S[:1], 2.0), S[:1], 1e-6)


# --- bad input


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: DCMerge(rank=0), "rank is 0"),
        (lambda: DCMerge(rank=2.5), "rank is 2.5"),
        (lambda: DCMerge(density=0), "density is 0"),
        (lambda: DCMerge(density=1.5), "density is 1.5"),
        (lambda: DCMerge(smoothing=0.5), "smoothing is 0.5"),
        (lambda: DCMerge(smoothing=float("nan")), "smoothing is nan"),
        (lambda: DCMerge(smoothing=float("inf")), "smoothing is inf"),
        (lambda: DCMerge(other="tsvm"), "other is 'tsvm', but must be one of dc, mean"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(make: Callable[[], Merger], named: str) -> None:
    with pytest.raises(InputError, match=f"DCMerge: {named}"):
        make()
