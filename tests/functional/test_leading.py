"""Leading eigenpairs against whole eigendecompositions in float64."""

import pytest
import torch
from formulas import matrix
from tolerances import subspace
from torch import Tensor

from mergekit_vision.functional import leading
from mergekit_vision.functional.leading import leading_eigenpairs


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is large in practice would be slow here."""
    monkeypatch.setattr(leading, "SIDE", 32)


def spectrum(values: Tensor) -> Tensor:
    Q = torch.linalg.qr(matrix(len(values), len(values), 10.0)).Q
    return Q @ torch.diag(values) @ Q.T


def assert_leading(G: Tensor, k: int) -> None:
    values, vectors = torch.linalg.eigh(G)
    found, X = leading_eigenpairs(G, k)
    n, scale = len(G), float(values[-1])
    bound = subspace(n, scale, float(values[-k] - values[-k - 1]))
    torch.testing.assert_close(found, values.flip(0)[:k], rtol=0, atol=n * 2.0**-52 * scale + bound**2 * scale)
    assert (X.T @ X - torch.eye(k)).norm() <= n * 2.0**-52
    assert (X.T @ vectors[:, :-k]).norm() <= leading.ERROR + bound
    assert (G @ X - X * found).norm() <= (leading.ERROR + n * 2.0**-52) * scale


@pytest.mark.parametrize("scale", [1e-60, 1.0, 1e60])
@pytest.mark.parametrize("low", [1e-2, 1e-4, 1e-9])
@pytest.mark.parametrize("k", [1, 8])
def test_agree_with_the_whole(k: int, low: float, scale: float) -> None:
    assert_leading(scale * spectrum(torch.logspace(0, torch.tensor(low).log10().item(), 64, dtype=torch.float64)), k)


@pytest.mark.parametrize("gap", [1e-4, 1e-5, 1e-6, 1e-8])
def test_narrow_gaps(gap: float) -> None:
    """Whether float32 is refined or float64 does it all."""
    values = [*torch.linspace(1, 0.1, 80).double(), *torch.linspace(0.1 - gap, 0.01, 432).double()]
    G = spectrum(torch.tensor(values, dtype=torch.float64))
    assert (leading._refined(G, 80) is not None) or gap < 1e-4
    assert_leading(G, 80)


def test_what_float32_takes_for_another_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the next eigenvector in place of the last leading one, residuals would be as small."""
    G = spectrum(torch.logspace(0, -2, 64, dtype=torch.float64))
    values, vectors = torch.linalg.eigh(G)
    leading_ones, others = vectors[:, -8:], vectors[:, :-8]
    torch.testing.assert_close(leading._largest_outside(G, leading_ones, others[:, -8:]), values[-9])
    swapped = torch.cat([vectors[:, -9:-8], vectors[:, -7:]], 1)
    torch.testing.assert_close(leading._largest_outside(G, swapped, vectors[:, [-12, -11, -10, -8]]), values[-8])
    assert leading._refined(G, 8) is not None
    monkeypatch.setattr(leading, "_largest_outside", lambda G, X, near: values[-8])
    assert leading._refined(G, 8) is None


def test_eigenvalues_that_coincide_among_the_leading_ones() -> None:
    assert_leading(spectrum(torch.tensor([5.0] * 6 + [4.0] * 2 + [1.0] * 40 + [0.0] * 16, dtype=torch.float64)), 8)


@pytest.mark.parametrize("values", [[1.0] * 64, [3.0] * 4 + [0.0] * 60, [2.0] * 8 + [2.0 - 1e-9] * 56, [0.0] * 64])
def test_what_float32_cannot_tell_apart_is_left_to_float64(values: list[float]) -> None:
    G = spectrum(torch.tensor(values, dtype=torch.float64))
    assert leading._refined(G, 8) is None
    exact = torch.linalg.eigvalsh(G).flip(0)[:8]
    assert leading_eigenpairs(G, 8)[0].equal(torch.linalg.eigh(G)[0].flip(0)[:8])
    assert (leading_eigenpairs(G, 8)[0] - exact).abs().max() <= 64 * 2.0**-52 * 3


def test_the_whole_and_nothing() -> None:
    G = spectrum(torch.linspace(1, 2, 40, dtype=torch.float64))
    assert [part.shape for part in leading_eigenpairs(G, 0)] == [(0,), (40, 0)]
    assert [part.shape for part in leading_eigenpairs(G, 50)] == [(40,), (40, 40)]
