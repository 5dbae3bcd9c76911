import pytest
import torch
from torch import Tensor

from mergekit_vision.functional.linalg import polar, polar_product, top_svd


def matrix(m: int, n: int, cond: float, seed: int = 0, rank: int | None = None) -> Tensor:
    """Float64 matrix of a given condition number; of a given rank, if any."""
    generator = torch.Generator().manual_seed(seed)
    U, S, Vh = torch.linalg.svd(torch.randn(m, n, generator=generator, dtype=torch.float64), full_matrices=False)
    S = torch.logspace(0, -torch.log10(torch.tensor(cond)).item(), len(S), dtype=torch.float64)
    if rank is not None:
        S[rank:] = 0
    return U @ torch.diag(S) @ Vh


def exact_polar(M: Tensor, rank: int | None = None) -> Tensor:
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    return U[:, :rank] @ Vh[:rank]


@pytest.mark.parametrize(("m", "n"), [(64, 24), (24, 64), (40, 40)])
@pytest.mark.parametrize(("cond", "error"), [(1e3, 1e-9), (1e5, 1e-5)])
def test_polar_agrees_with_the_svd(m, n, cond, error):
    M = matrix(m, n, cond)
    Q, nuclear = polar(M)
    assert (Q - exact_polar(M)).norm() / Q.norm() < error
    assert nuclear == pytest.approx(float(torch.linalg.svdvals(M).sum()), rel=1e-12)
    assert float((Q * M).sum()) == pytest.approx(nuclear, rel=1e-9)
    gram = Q @ Q.T if m < n else Q.T @ Q
    assert (gram - torch.eye(min(m, n), dtype=torch.float64)).abs().max() < error


@pytest.mark.parametrize("shape", [(32, 48), (48, 32)])
def test_polar_of_a_rank_deficient_matrix_is_unique(shape):
    M = matrix(*shape, cond=1e3, rank=20)
    generator = torch.Generator().manual_seed(1)
    noisy = M + 1e-15 * torch.randn(shape, generator=generator, dtype=torch.float64)
    assert (polar(M).factor - exact_polar(M, 20)).norm() < 1e-8
    assert (polar(M).factor - polar(noisy).factor).norm() < 1e-8


def test_polar_keeps_float32_and_computes_in_float64():
    M = matrix(64, 24, 1e3).float()
    assert polar(M).factor.dtype == torch.float32
    assert (polar(M).factor - exact_polar(M.double())).norm() < 1e-6


def test_polar_of_zero_is_zero():
    assert polar(torch.zeros(4, 3)).factor.equal(torch.zeros(4, 3))
    assert polar(torch.zeros(4, 3)).nuclear_norm == 0


@pytest.mark.parametrize(("m", "p", "n"), [(48, 32, 24), (48, 24, 32), (24, 48, 32), (24, 48, 64), (32, 32, 32)])
@pytest.mark.parametrize("with_diagonal", [False, True])
def test_polar_product_is_the_product_of_the_polar_factors(m, p, n, with_diagonal):
    L, R = matrix(m, p, 1e3, seed=1), matrix(p, n, 1e2, seed=2)
    diagonal = torch.linspace(1, 3, p, dtype=torch.float64)
    found = polar_product(L, R, diagonal if with_diagonal else None)
    expected = exact_polar(L) @ (torch.diag(diagonal) if with_diagonal else torch.eye(p, dtype=torch.float64)) @ exact_polar(R)
    assert (found.product - expected).norm() / expected.norm() < 1e-9
    assert found.left_mean == pytest.approx(float(torch.linalg.svdvals(L).mean()))
    assert found.right_mean == pytest.approx(float(torch.linalg.svdvals(R).mean()))


def test_polar_product_of_repeated_columns_does_not_amplify_round_off():
    """Tasks that share a subspace: the untruncated product is garbage in most of its energy."""
    block, R = matrix(32, 10, 10), matrix(30, 16, 1e2, seed=2)
    L = torch.cat([block] * 3, 1)
    noise = 1e-15 * torch.randn(L.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found, noisy = polar_product(L, R).product, polar_product(L + noise, R).product
    assert (found - noisy).norm() / found.norm() < 1e-8
    assert (found - exact_polar(L, 10) @ exact_polar(R)).norm() / found.norm() < 1e-8


@pytest.mark.parametrize(("m", "n"), [(64, 24), (24, 64), (40, 40)])
@pytest.mark.parametrize("k", [0, 1, 7, 24, 100])
def test_top_svd_agrees_with_the_svd(m, n, k):
    M = matrix(m, n, 1e4)
    U, S, Vh = top_svd(M, k)
    exact_U, exact_S, exact_Vh = torch.linalg.svd(M, full_matrices=False)
    assert U.shape == (m, min(k, m, n))
    assert Vh.shape == (min(k, m, n), n)
    torch.testing.assert_close(S, exact_S[:k], rtol=1e-7, atol=0)
    torch.testing.assert_close(U @ torch.diag(S) @ Vh, exact_U[:, :k] @ torch.diag(exact_S[:k]) @ exact_Vh[:k], rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_top_svd_stops_at_the_numerical_rank(shape):
    M = matrix(*shape, cond=1e3, rank=9)
    assert len(top_svd(M, 20).S) == 9
    assert len(top_svd(M.float(), 5).S) == 5
    assert len(top_svd(torch.zeros(shape), 5).S) == 0
