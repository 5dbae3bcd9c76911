"""Polar factors by Halley's iteration, against singular value decompositions."""

import pytest
import torch
from formulas import matrix
from tolerances import eps
from torch import Tensor

from mergekit_vision.functional import halley, linalg
from mergekit_vision.functional.halley import TOLERANCE, Polar, pays, polar_by_halley
from mergekit_vision.functional.linalg import polar, polar_product

DOUBLE = eps(torch.float64)


SHAPES = [(shape, condition) for shape in ((60, 60), (90, 40), (40, 90)) for condition in (1.0, 1e3, 1e6)]


@pytest.mark.parametrize(("shape", "condition"), [*SHAPES, ((1, 5), 1.0), ((3, 1), 1.0)])
def test_any_shape_and_condition(shape: tuple[int, int], condition: float) -> None:
    """The Cholesky factors of the first step lose digits in proportion to the condition number."""
    M = matrix(*shape, condition)
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    found = polar_by_halley(M)
    assert found is not None
    bound = 8 * max(shape) * DOUBLE * float(S[0] / S[-1])
    assert float((found.factor - U @ Vh).norm()) <= bound * min(shape) ** 0.5
    assert found.nuclear_norm == pytest.approx(float(S.sum()), rel=bound)


@pytest.mark.parametrize("condition", [2 / TOLERANCE, 1e12])
def test_what_may_be_singular_is_left_to_others(condition: float) -> None:
    assert polar_by_halley(matrix(50, 50, condition)) is None
    assert polar_by_halley(torch.zeros(5, 4).double()) is None
    assert polar_by_halley(torch.ones(5, 4).double()) is None


@pytest.mark.parametrize("shape", [(5, 0), (0, 5), (0, 0)])
def test_a_matrix_without_entries_is_left_to_others(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg, "pays", lambda M: True)
    M = torch.zeros(shape).double()
    assert polar_by_halley(M) is None
    found = polar(M)
    assert (found.factor.shape, found.nuclear_norm) == (shape, 0.0)
    assert polar_product(M, M.T).product.equal(torch.zeros(shape[0], shape[0]).double())


def test_where_it_pays_polar_factors_are_found_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And null directions stay null, by an eigendecomposition."""
    left, right = matrix(60, 40, 100.0).float(), matrix(40, 50, 10.0).float()
    diagonal, deficient = torch.linspace(1, 2, 40), torch.diag(torch.tensor([2.0, 1.0, 0.0]))
    expected, factor = polar_product(left, right, diagonal), polar(deficient).factor
    seen = list[tuple[int, ...]]()

    def noted(M: Tensor, tol: float) -> Polar | None:
        seen.append(tuple(M.shape))
        return polar_by_halley(M, tol)

    monkeypatch.setattr(linalg, "pays", lambda M: True)
    monkeypatch.setattr(linalg, "polar_by_halley", noted)
    found = polar_product(left, right, diagonal)
    assert sorted(seen) == [(40, 50), (60, 40)]
    assert float((found.product - expected.product).norm()) <= 8 * eps() * float(expected.product.norm())
    assert (found.left_mean, found.right_mean) == pytest.approx((expected.left_mean, expected.right_mean), rel=1e4 * DOUBLE)
    assert torch.equal(polar(deficient).factor, factor)
    assert torch.equal(polar(torch.diag(torch.tensor([1.0, 1e-3])), tol=1e-2).factor, torch.diag(torch.tensor([1.0, 0.0])))


def test_it_pays_where_float64_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not pays(torch.ones(1).double())
    for double, expected in ((2.0, True), (40.0, False)):
        halley.has_fast_double.cache_clear()
        times = iter([1.0, double])
        monkeypatch.setattr(halley, "_seconds", lambda A, times=times: next(times))
        assert halley.has_fast_double(torch.device("cpu"), side=4) == expected
    halley.has_fast_double.cache_clear()
