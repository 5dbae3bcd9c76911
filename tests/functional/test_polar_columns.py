"""Columns of polar factors against full SVDs."""

import pytest
import torch
from formulas import exact_polar, matrix
from tolerances import direct, summed
from torch import Tensor

from mergekit_vision.functional import linalg, polar_columns
from mergekit_vision.functional.linalg import polar_product
from mergekit_vision.functional.polar_columns import TOLERANCE, is_large
from mergekit_vision.functional.polar_columns import polar_columns as columns_of


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is large in practice would be slow here."""
    monkeypatch.setattr(polar_columns, "SIDE", 32)


def assert_exact(M: Tensor, Z: Tensor, cond: float) -> None:
    found, exact = columns_of(M, Z), exact_polar(M.double()) @ Z.double()
    assert found is not None
    assert found.product.dtype == torch.float32
    S = torch.linalg.svdvals(M.double())
    assert (found.product - exact).norm() / exact.norm() < TOLERANCE + direct(max(M.shape), cond)
    assert found.nuclear_norm == pytest.approx(float(S.sum()), rel=TOLERANCE + summed(len(M)))


def columns(n: int, k: int = 20) -> Tensor:
    return torch.linalg.qr(torch.randn(n, k, generator=torch.Generator().manual_seed(9)))[0]


@pytest.mark.parametrize("shape", [(64, 64), (96, 64), (64, 96)])
@pytest.mark.parametrize("cond", [1.0, 1e1, 1e3, 1e5])
def test_agrees_with_the_svd(shape: tuple[int, int], cond: float) -> None:
    assert_exact(matrix(*shape, cond).float(), columns(shape[1]), cond)


def test_random_columns_and_one_tiny_singular_value() -> None:
    """As tasks' directions side by side are: the smallest value alone does not set how hard the polar factor is."""
    U, S, Vh = torch.linalg.svd(torch.randn(256, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    S[-1] = 1e-5 * S[0]
    assert_exact((U @ torch.diag(S) @ Vh).float(), columns(256, 64), float(S[0] / S[-2]))


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_matrices_of_any_size(scale: float) -> None:
    M, Z = matrix(96, 96, 1e5).float(), columns(96)
    found, scaled = columns_of(M, Z), columns_of(M * scale, Z)
    assert (found.product - scaled.product).norm() / found.product.norm() < TOLERANCE + direct(96, 1e5)
    assert scaled.nuclear_norm == pytest.approx(scale * found.nuclear_norm, rel=TOLERANCE + summed(96))


def test_one_singular_value_far_above_the_others() -> None:
    """Its vectors, at right angles to all that an iteration would start with, decide the result here."""
    U = torch.linalg.qr(torch.tensor([[2.0], [1.0], *[[0.0]] * 190], dtype=torch.float64), mode="complete").Q
    M = U @ torch.diag(torch.tensor([3.0, *[1.0] * 191], dtype=torch.float64)) @ U.T
    assert_exact(M.float(), U[:, :1].float(), 3.0)


def test_a_repeated_column_makes_a_matrix_singular() -> None:
    M = torch.randn(192, 192, generator=torch.Generator().manual_seed(0))
    assert columns_of(M, columns(192)) is not None
    M[:, 7] = 0.3 * M[:, 100]
    assert columns_of(M, columns(192)) is None


def test_no_column_and_gradients() -> None:
    M = matrix(64, 64, 10).float().requires_grad_()
    assert columns_of(M, columns(64, 0)).product.shape == (64, 0)
    assert not columns_of(M, columns(64)).product.requires_grad


def test_more_columns_than_rows() -> None:
    M = matrix(64, 64, 1e2).float()
    assert_exact(M, torch.randn(64, 100, generator=torch.Generator().manual_seed(0)), 1e2)


def test_leaves_to_others_what_it_is_not_made_for() -> None:
    assert not is_large(matrix(64, 64, 10))  # float64
    assert not is_large(matrix(64, 24, 10).float())
    for M in (matrix(64, 64, 10, rank=40).float(), torch.zeros(64, 64), torch.full((64, 64), torch.nan)):
        assert columns_of(M, columns(64)) is None


@pytest.mark.parametrize("rank", [None, 40])
def test_the_product_is_the_same_with_and_without(monkeypatch: pytest.MonkeyPatch, rank: int | None) -> None:
    L, R = matrix(64, 64, 1e2, rank=rank).float(), matrix(64, 40, 10, seed=1).float()
    diagonal = torch.linspace(1, 3, 64)
    found = polar_product(L, R, diagonal)
    monkeypatch.setattr(linalg, "is_large", lambda M: False)
    other = polar_product(L, R, diagonal)
    assert (found.product - other.product).norm() / other.product.norm() < TOLERANCE + direct(64, 1e2) + direct(40, 10)
    assert found.left_mean == pytest.approx(other.left_mean, rel=TOLERANCE + summed(64))
    assert found.right_mean == other.right_mean
