"""Partial fractions against eigendecompositions."""

import pytest
import torch
from formulas import matrix
from tolerances import direct, summed

from mergekit_vision.functional import zolotarev
from mergekit_vision.functional.zolotarev import InverseRoot, cholesky_solve_, root_products


@pytest.mark.parametrize(("low", "high"), [(1.0, 2.0), (1e-4, 1.0), (3.0, 3e7)])
def test_the_fractions_are_the_fewest_and_the_best(low: float, high: float) -> None:
    tol = 1e-5
    root = InverseRoot.on(low, high, tol)
    x = torch.logspace(torch.tensor(low).log10().item(), torch.tensor(high).log10().item(), 5000, dtype=torch.float64)
    ratio = sum(w / (x + s) for s, w in zip(root.shifts, root.weights, strict=True)) * x.sqrt() - 1
    assert float(ratio.abs().max()) <= 1.01 * root.error <= 1.01 * tol
    ends = ratio[1:-1][(ratio[1:-1] - ratio[:-2]) * (ratio[2:] - ratio[1:-1]) < 0]
    assert len(ends) >= 2 * len(root.shifts) - 2, "the error of a best approximation oscillates between its bounds"
    assert float(ends.abs().min()) > 0.9 * root.error
    exact = sum(w / 2 * torch.log1p(x / s) for s, w in zip(root.shifts, root.weights, strict=True)) + root.constant
    assert float((exact / x.sqrt() - 1).abs().max()) < 10 * tol


def test_products_and_trace_of_the_root() -> None:
    M, cond = matrix(70, 70, 1e2), 1e4
    G, Z = M.T @ M, torch.randn(70, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, trace = root_products(G, Z, 1 / cond, 1.0, tol=1e-9)
    values, vectors = torch.linalg.eigh(G)
    exact = vectors @ ((vectors.T @ Z) / values.sqrt()[:, None])
    assert (found - exact).norm() / exact.norm() < 1e-9 + direct(70, cond, torch.float64)
    assert trace == pytest.approx(float(values.sqrt().sum()), rel=1e-8)


@pytest.mark.parametrize("n", [1, 16, 50])
def test_cholesky_in_blocks(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setattr(zolotarev, "BLOCK", 16)
    M = matrix(n, n, 10.0) if n > 1 else torch.ones(1, 1).double()
    A, Z = (M.T @ M).float(), torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
    exact, determinant = torch.linalg.solve(A.double(), Z.double()), float(torch.logdet(A.double()))
    assert cholesky_solve_(A, Z) == pytest.approx(determinant, abs=summed(n) * n)
    assert (Z - exact).norm() / exact.norm() < direct(n, 1e2)
