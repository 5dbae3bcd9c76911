"""Polar factors and leading singular triplets against full SVDs."""

import pytest
import torch
from formulas import exact_polar, matrix
from tolerances import assert_near, direct, eps, from_gram, sum_from_gram, summed

from mergekit_vision.functional.gram import GRAM_BLOCK, gram
from mergekit_vision.functional.linalg import MILD, polar, polar_product, top_svd, top_svd_of_product


@pytest.mark.parametrize(("m", "n"), [(64, 24), (24, 64), (40, 40)])
@pytest.mark.parametrize("cond", [1e3, 1e5])
def test_polar_agrees_with_the_svd(m: int, n: int, cond: float) -> None:
    M, side = matrix(m, n, cond), min(m, n)
    Q, nuclear = polar(M)
    assert (Q - exact_polar(M)).norm() / Q.norm() < from_gram(cond)
    assert nuclear == pytest.approx(float(torch.linalg.svdvals(M).sum()), rel=sum_from_gram(side, cond))
    assert float((Q * M).sum()) == pytest.approx(nuclear, rel=sum_from_gram(side, cond))
    assert_near(Q @ Q.T if m < n else Q.T @ Q, torch.eye(side, dtype=torch.float64), from_gram(cond))


@pytest.mark.parametrize("shape", [(32, 48), (48, 32)])
def test_polar_of_a_rank_deficient_matrix_is_unique(shape: tuple[int, int]) -> None:
    M = matrix(*shape, cond=1e3, rank=20)
    generator = torch.Generator().manual_seed(1)
    noisy = M + 1e-15 * torch.randn(shape, generator=generator, dtype=torch.float64)
    expected = exact_polar(M, 20)
    assert (polar(M).factor - expected).norm() / expected.norm() < from_gram(1e3)
    assert (polar(noisy).factor - expected).norm() / expected.norm() < from_gram(1e3)


def test_polar_keeps_float32_and_computes_in_float64() -> None:
    M = matrix(64, 24, 1e3).float()
    found, expected = polar(M).factor, exact_polar(M.double())
    assert found.dtype == torch.float32
    assert (found - expected).norm() / expected.norm() < eps(torch.float32), "rounded once"


@pytest.mark.parametrize(("m", "n"), [(600, 512), (24, 64), (40, 40)])
@pytest.mark.parametrize("cond", [2.0, 90.0, 1e4])
def test_polar_in_float32_is_multiplied_out_in_it_where_the_condition_allows(m: int, n: int, cond: float) -> None:
    M, side = matrix(m, n, cond), min(m, n)
    found, nuclear = polar(M, dtype=torch.float32)
    assert found.dtype == torch.float32
    off = float(torch.linalg.matrix_norm(found.double() - exact_polar(M), 2))
    rounded = side**0.5 * eps()  # of entries independently
    assert off <= (direct(side, cond) if cond <= MILD else rounded + from_gram(cond))
    assert nuclear == pytest.approx(float(torch.linalg.svdvals(M).sum()), rel=sum_from_gram(side, cond))


@pytest.mark.parametrize("side", [5, 2 * GRAM_BLOCK + 3])
def test_gram_matrices_add_up_in_place(side: int) -> None:
    A = torch.randn(40, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = torch.zeros(side, side, dtype=torch.float64)
    for part in A.split(16):
        assert gram(part, total) is total
    for start in range(0, side, GRAM_BLOCK):  # blocks beside the diagonal are copied; in one on it, products may round otherwise
        block = slice(start, start + GRAM_BLOCK)
        assert torch.equal(total[start + GRAM_BLOCK :, block], total[block, start + GRAM_BLOCK :].T)
        assert_near(total[block, block], total[block, block].T, summed(40, torch.float64))
    assert_near(total, A.T @ A, summed(40, torch.float64))
    assert_near(gram(A), A.T @ A, summed(40, torch.float64))


def test_polar_of_zero_is_zero() -> None:
    assert polar(torch.zeros(4, 3)).factor.equal(torch.zeros(4, 3))
    assert polar(torch.zeros(4, 3)).nuclear_norm == 0


@pytest.mark.parametrize(("m", "p", "n"), [(48, 32, 24), (48, 24, 32), (24, 48, 32), (24, 48, 64), (32, 32, 32)])
@pytest.mark.parametrize("with_diagonal", [False, True])
def test_polar_product_is_the_product_of_the_polar_factors(m: int, p: int, n: int, with_diagonal: bool) -> None:
    L, R = matrix(m, p, 1e3, seed=1), matrix(p, n, 1e2, seed=2)
    diagonal = torch.linspace(1, 3, p, dtype=torch.float64)
    found = polar_product(L, R, diagonal if with_diagonal else None)
    expected = exact_polar(L) @ (torch.diag(diagonal) if with_diagonal else torch.eye(p, dtype=torch.float64)) @ exact_polar(R)
    assert (found.product - expected).norm() / expected.norm() < from_gram(1e3) + from_gram(1e2)
    assert found.left_mean == pytest.approx(float(torch.linalg.svdvals(L).mean()), rel=sum_from_gram(p, 1e3))
    assert found.right_mean == pytest.approx(float(torch.linalg.svdvals(R).mean()), rel=sum_from_gram(p, 1e2))


def test_polar_product_of_repeated_columns_does_not_amplify_round_off() -> None:
    """Tasks that share a subspace: the untruncated product is garbage in most of its energy."""
    block, R = matrix(32, 10, 10), matrix(30, 16, 1e2, seed=2)
    L = torch.cat([block] * 3, 1)
    noise = 1e-15 * torch.randn(L.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found, noisy = polar_product(L, R).product, polar_product(L + noise, R).product
    expected = exact_polar(L, 10) @ exact_polar(R)
    for product in (found, noisy):
        assert (product - expected).norm() / expected.norm() < from_gram(1e2) + from_gram(10)


@pytest.mark.parametrize(("m", "n"), [(64, 24), (24, 64), (40, 40)])
@pytest.mark.parametrize("k", [0, 1, 7, 24, 100])
def test_top_svd_agrees_with_the_svd(m: int, n: int, k: int) -> None:
    M = matrix(m, n, 1e4)
    U, S, Vh = top_svd(M, k)
    exact_U, exact_S, exact_Vh = torch.linalg.svd(M, full_matrices=False)
    assert U.shape == (m, min(k, m, n))
    assert Vh.shape == (min(k, m, n), n)
    torch.testing.assert_close(S, exact_S[:k], rtol=from_gram(1e4), atol=0)
    expected = exact_U[:, :k] @ torch.diag(exact_S[:k]) @ exact_Vh[:k]
    assert (U @ torch.diag(S) @ Vh - expected).norm() <= sum_from_gram(min(m, n), 1e4) * expected.norm()


@pytest.mark.parametrize(("m", "r", "n"), [(64, 3, 24), (24, 24, 40), (24, 30, 40)])
@pytest.mark.parametrize("k", [0, 2, 100])
def test_top_svd_of_a_product_is_that_of_its_factors(m: int, r: int, n: int, k: int) -> None:
    up, down = matrix(m, r, 1e2), matrix(r, n, 1e2, seed=1)
    U, S, Vh = top_svd_of_product(up, down, k)
    exact_U, exact_S, exact_Vh = torch.linalg.svd(up @ down, full_matrices=False)
    rank = min(k, m, r, n)
    bound = max(m, n) * 1e4 * eps(torch.float64)  # the condition of the product is that of both factors
    torch.testing.assert_close(S, exact_S[:rank], rtol=bound, atol=0)
    expected = exact_U[:, :rank] @ torch.diag(exact_S[:rank]) @ exact_Vh[:rank]
    assert (U @ torch.diag(S) @ Vh - expected).norm() <= bound * expected.norm()
    assert len(top_svd_of_product(up, torch.zeros_like(down), 5).S) == 0


@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_top_svd_stops_at_the_numerical_rank(shape: tuple[int, int]) -> None:
    M = matrix(*shape, cond=1e3, rank=9)
    assert len(top_svd(M, 20).S) == 9
    assert len(top_svd(M.float(), 5).S) == 5
    assert len(top_svd(torch.zeros(shape), 5).S) == 0
