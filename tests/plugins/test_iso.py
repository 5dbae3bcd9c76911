"""Iso-C and Iso-CTS against their formulas, written plainly in float64 with full SVDs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from formulas import matrix, polar_svd
from synthetic import Zoo, relative_error
from tolerances import assert_near, eps, of_formula, sum_from_gram
from torch import Tensor
from updates import BLOCKS, LIMIT, assert_updates, matrices, real_inputs

from mergekit_vision.errors import InputError
from mergekit_vision.functional.iso import flat_spectrum, iso_cts_merge, subspace_sizes
from mergekit_vision.merger import Merger
from mergekit_vision.plugins.iso import IsoC, IsoCTS

TASKS = [1, 2, 3, 8, 30]  # 3 and 8 divide not all sides, 30 is more than any small side


def iso_c(deltas: Tensor) -> Tensor:
    """The sum's singular vectors with its mean singular value."""
    polar, mean = polar_svd(deltas.sum(0))
    return mean * polar


def iso_cts(deltas: Tensor, fraction: float = 0.8) -> Tensor:
    """Common and task-specific directions, side by side, as the published code counts them."""
    T, o, i = deltas.shape
    r = min(o, i)
    q = round((r - int(fraction * r)) / T)
    c = r - T * q
    U, S, Vh = (part.clone() for part in torch.linalg.svd(deltas.sum(0), full_matrices=False))
    Us, Ss, Vs = [U[:, :c]], [S[:c]], [Vh[:c]]
    for delta in deltas:
        rest = delta - Us[0] @ Us[0].T @ delta
        u, s, vh = torch.linalg.svd(rest, full_matrices=False)
        Us, Ss, Vs = [*Us, u[:, :q]], [*Ss, s[:q]], [*Vs, vh[:q]]
    return torch.cat(Ss).mean() * polar_svd(torch.cat(Us, 1))[0] @ polar_svd(torch.cat(Vs))[0]


def of_zoo(formula: Callable[[Tensor], Tensor], other: bool = True) -> Callable[[Zoo], dict[str, Tensor]]:
    """The merged update of a whole model."""

    def update(zoo: Zoo) -> dict[str, Tensor]:
        deltas, flat = {key: zoo.delta64(key) for key in zoo.base}, matrices(zoo, other)
        return {key: formula(deltas[key]) if key in flat else deltas[key].mean(0) for key in zoo.base}

    return update


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize(("merger", "formula"), [(IsoC(), iso_c), (IsoCTS(), iso_cts)], ids=["IsoC", "IsoCTS"])
def test_the_published_formula(merger: Merger, formula: Callable[[Tensor], Tensor], tasks: int) -> None:
    zoo = Zoo(tasks=tasks)
    merged = merger.merge(zoo.inputs())
    assert (merged.scale, merged.fixed) == (1.0, frozenset())
    assert_updates(merged.update, of_zoo(formula), zoo)


@pytest.mark.parametrize("common", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("tasks", [2, 3])
def test_the_common_share(common: float, tasks: int) -> None:
    zoo = Zoo(tasks=tasks)
    if common == 0.0:  # there the published count may exceed the directions that there are
        zoo.base = {key: value for key, value in zoo.base.items() if value.dim() != 2 or min(value.shape) % tasks == 0}
    assert_updates(IsoCTS(common=common).merge(zoo.inputs()).update, of_zoo(lambda deltas: iso_cts(deltas, common)), zoo)


@pytest.mark.parametrize(("cls", "formula"), [(IsoC, iso_c), (IsoCTS, iso_cts)])
def test_matrices_outside_of_the_blocks_may_be_averaged(cls: type[IsoC], formula: Callable[[Tensor], Tensor]) -> None:
    zoo = Zoo(tasks=4)
    assert_updates(cls(other="mean").merge(zoo.inputs()).update, of_zoo(formula, other=False), zoo)


@pytest.mark.parametrize("cls", [IsoC, IsoCTS])
@pytest.mark.parametrize("other", ["isotropic", "mean"])
def test_the_average_may_be_left_unscaled(cls: type[IsoC], other: str) -> None:
    zoo = Zoo(tasks=2)
    merged = cls(other=other, scale_average=False).merge(zoo.inputs())
    assert merged.update.keys() - merged.fixed == matrices(zoo, other == "isotropic")
    assert matrices(zoo, False) == BLOCKS


@pytest.mark.parametrize("cls", [IsoC, IsoCTS])
def test_what_no_expert_changed_is_left_out(cls: type[Merger]) -> None:
    zoo = Zoo(tasks=2)
    for expert in zoo.experts.values():
        expert["visual.proj"] = zoo.base["visual.proj"].clone()
    assert zoo.base.keys() - cls().merge(zoo.inputs()).update.keys() == {"visual.proj"}


@pytest.mark.parametrize(("merger", "formula"), [(IsoC(), iso_c), (IsoCTS(), iso_cts)], ids=["IsoC", "IsoCTS"])
def test_real_experts(zoo: Path, merger: Merger, formula: Callable[[Tensor], Tensor]) -> None:
    inputs = real_inputs(zoo)
    for key, value in merger.merge(inputs).update.items():
        deltas = inputs.deltas(key).double()
        assert relative_error(value, formula(deltas)) <= min(of_formula(formula, deltas), LIMIT), key


# --- the math


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (12, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_flat_spectrum_keeps_the_sum_of_the_singular_values(shape: tuple[int, int], dtype: torch.dtype) -> None:
    M = matrix(*shape, cond=100.0)
    flat = flat_spectrum(M.to(dtype))
    assert flat.dtype == dtype
    S = torch.linalg.svdvals(flat.double())
    bound = sum_from_gram(12, 100.0) + 100.0**2 * eps(torch.float64) + (100 * eps() if dtype == torch.float32 else 0.0)
    assert_near(S, torch.linalg.svdvals(M).mean().expand(12), bound)


@pytest.mark.parametrize("merge", [lambda M: flat_spectrum(M), lambda M: iso_cts_merge(M[None])], ids=["IsoC", "IsoCTS"])
def test_null_directions_stay_zero(merge: Callable[[Tensor], Tensor]) -> None:
    """The mean is over all singular values, null ones included; an SVD would pick vectors for these at random."""
    M = matrix(20, 9, cond=10.0, rank=4)
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    assert_near(merge(M), S.mean() * U[:, :4] @ Vh[:4], 1e-10)


@pytest.mark.parametrize("common", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (12, 12)])
def test_of_one_task_both_are_the_same(common: float, shape: tuple[int, int]) -> None:
    M = matrix(*shape, cond=100.0)
    assert_near(iso_cts_merge(M[None], common), flat_spectrum(M), 1e-8)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30)])
def test_experts_within_the_common_subspace_add_nothing(shape: tuple[int, int]) -> None:
    """What deflation leaves of them is round-off, whose directions would get the same weight as all others."""
    M = matrix(*shape, cond=10.0, rank=4)
    merged = iso_cts_merge(torch.stack([M, 2 * M]), common=0.5)
    assert_near(merged, flat_spectrum(3 * M), 1e-9)


def test_the_subspaces_fill_the_rank() -> None:
    for rank in (1, 5, 16, 50, 768, 1024):
        for tasks in (1, 2, 3, 7, 8, 14, 20, 64):
            for common in (0.0, 0.31, 0.5, 0.8, 1.0):
                shared, own = subspace_sizes(rank, tasks, common)
                assert shared >= 0
                assert own >= 0
                assert shared + tasks * own == rank
    assert [subspace_sizes(768, tasks, 0.8)[1] for tasks in (8, 14, 20)] == [19, 11, 8]
    assert [subspace_sizes(1024, tasks, 0.8)[1] for tasks in (8, 14, 20)] == [26, 15, 10]


# --- bad input


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: IsoC(other="flat"), "IsoC: other is 'flat', but must be one of isotropic, mean"),
        (lambda: IsoCTS(other=""), "IsoCTS: other is "),
        (lambda: IsoCTS(common=80), "IsoCTS: common is 80"),
        (lambda: IsoCTS(common=-0.1), "IsoCTS: common is "),
        (lambda: IsoCTS(common=float("nan")), "IsoCTS: common is "),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(make: Callable[[], Merger], named: str) -> None:
    with pytest.raises(InputError, match=named):
        make()
