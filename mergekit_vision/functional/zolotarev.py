"""Inverse square roots of large matrices times columns, by Zolotarev's partial fractions.

The best approximation of ``x**-0.5`` on an interval, in the relative sense, by ``r`` fractions ``w / (x + s)`` is known in
closed form, and its error falls exponentially with ``r``: one Cholesky factorization and one solution a fraction take the
place of an eigendecomposition. Its integral approximates the root, so that the determinants of the same factors give the trace
of the matrix's root.
Source: Zolotarev (1877), in the form of Nakatsukasa and Freund, "Computing Fundamental Matrix Decompositions Accurately via the
Matrix Sign Function in Two Iterations: The Power of Zolotarev's Functions" (SIAM Review 2016), section 3; Hale, Higham and
Trefethen, "Computing A^α, log(A), and Related Matrix Functions by Contour Integrals" (SINUM 2008).
"""

import math
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 384
"""Side of the diagonal blocks of a Cholesky factor; all else is products, which run at a processor's full speed."""


class InverseRoot(NamedTuple):
    """``x**-0.5 ≈ Σ w / (x + s)`` and ``x**0.5 ≈ constant + Σ w / 2 log(1 + x / s)`` on an interval.

    Attributes:
        shifts: ``s``, smallest first; all positive.
        weights: ``w``, likewise.
        constant: of the root.
        error: largest relative error of the inverse root.
    """

    shifts: tuple[float, ...]
    weights: tuple[float, ...]
    constant: float
    error: float

    @classmethod
    def on(cls, low: float, high: float, tol: float) -> "InverseRoot":
        """The fewest fractions that are off by ``tol`` at most on ``[low, high]``, ``0 < low < high``.

        >>> root = InverseRoot.on(0.01, 1.0, tol=1e-3)
        >>> abs(0.5 * sum(w / (0.25 + s) for s, w in zip(root.shifts, root.weights)) - 1) < 1e-3
        True
        """
        return next(found for r in count(1) if (found := cls._of(low, high, r)).error <= tol)

    @classmethod
    def _of(cls, low: float, high: float, r: int) -> "InverseRoot":
        nodes = _nodes(low, high, r)
        poles, zeros = nodes[::2], nodes[1::2]
        others = [[other - pole for other in poles if other != pole] for pole in poles]
        weights = [math.prod(zero - p for zero in zeros) / math.prod(gaps) for p, gaps in zip(poles, others, strict=True)]
        x = torch.logspace(math.log10(low), math.log10(high), 64 * r + 1, dtype=torch.float64)
        ratio = sum((w / (x + s) for s, w in zip(poles, weights, strict=True)), torch.zeros_like(x)) * x.sqrt()
        least, most = float(ratio.min()), float(ratio.max())
        weights = [2 * w / (least + most) for w in weights]  # as much too large as too small
        roots = torch.linspace(math.sqrt(low), math.sqrt(high), 1000, dtype=torch.float64)
        logs = (w / 2 * torch.log1p(roots**2 / s) for s, w in zip(poles, weights, strict=True))
        constant = float((roots - sum(logs, torch.zeros_like(x[:1]))).mean())
        return cls(tuple(poles), tuple(weights), constant, (most - least) / (most + least))


def root_products(G: Tensor, Z: Tensor, low: float, high: float, tol: float) -> tuple[Tensor, float]:
    """``G^{-1/2} Z``, and the trace of ``G^{1/2}``, for a positive definite matrix.

    Args:
        G: ``[n, n]``, symmetric, float32 or float64.
        Z: ``[n, k]``, same dtype.
        low: lower bound of the eigenvalues, positive.
        high: upper bound of the eigenvalues.
        tol: relative error of the approximation, beside rounding.

    Returns:
        ``[n, k]`` in the dtype of ``G``, and the trace. Where bounds or precision do not hold, numbers that make no sense, or
        NaN: check the result.
    """
    root, n = InverseRoot.on(low, high, tol), len(G)
    product, shifted, columns = torch.zeros_like(Z), torch.empty_like(G), torch.empty_like(Z)
    trace = root.constant * n
    for shift, weight in zip(root.shifts, root.weights, strict=True):
        shifted.copy_(G).diagonal().add_(shift)
        log_determinant = cholesky_solve_(shifted, columns.copy_(Z))
        product.add_(columns, alpha=weight)
        trace += weight / 2 * (log_determinant - n * math.log(shift))
    return product, trace


def cholesky_solve_(A: Tensor, Z: Tensor) -> float:
    """Replace ``Z`` by ``A^{-1} Z`` and return the logarithm of the determinant of ``A``.

    LAPACK's factorization and solution, each at half the speed of a product, made of products but for small diagonal blocks,
    which are inverted.

    Args:
        A: ``[n, n]``, positive definite; its lower triangle is read, and overwritten.
        Z: ``[n, k]``, overwritten.

    >>> Z = torch.tensor([[2.0], [8.0]])
    >>> cholesky_solve_(torch.diag(torch.tensor([1.0, 4.0])), Z), Z
    (1.3862943611198906, tensor([[2.],
            [2.]]))
    """
    n = len(A)
    cuts = [slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]
    one = torch.eye(min(n, BLOCK), dtype=A.dtype, device=A.device)
    inverses, pivots = [], []
    for at in cuts:  # factor, and solve with the lower triangle on the way
        L = torch.linalg.cholesky_ex(A[at, at])[0]
        pivots.append(L.diagonal())
        inverses.append(torch.linalg.solve_triangular(L, one[: len(L), : len(L)], upper=False))
        Z[at] = inverses[-1] @ Z[at]
        below = slice(at.stop, n)
        A[below, at] = A[below, at] @ inverses[-1].T
        Z[below].addmm_(A[below, at], Z[at], alpha=-1)
        for column in cuts[len(inverses) :]:
            A[column.start :, column].addmm_(A[column.start :, at], A[column, at].T, alpha=-1)
    for at, inverse in zip(reversed(cuts), reversed(inverses), strict=True):
        Z[at].addmm_(A[at.stop :, at].T, Z[at.stop :], alpha=-1)
        Z[at] = inverse.T @ Z[at]
    return 2 * float(torch.cat(pivots).double().log().sum())


def _nodes(low: float, high: float, r: int) -> list[float]:
    """``low sn(u)² / cn(u)²`` at ``u = j K / (2 r)``, ``j = 1 … 2 r - 1``, of the elliptic modulus ``sqrt(1 - low / high)``.

    The amplitude, of which ``sn`` is the sine and ``cn`` the cosine, by the arithmetic-geometric mean (Abramowitz and Stegun
    16.4).
    """
    a, b, ratios = 1.0, math.sqrt(low / high), []
    while a - b > 1e-15 * a:
        a, b, half = (a + b) / 2, math.sqrt(a * b), (a - b) / 2
        ratios.append(half / a)
    nodes = []
    for j in range(1, 2 * r):
        amplitude = 2 ** len(ratios) * j * math.pi / (4 * r)  # u = j K / (2 r), and a K = π / 2
        for ratio in reversed(ratios):
            amplitude = (amplitude + math.asin(ratio * math.sin(amplitude))) / 2
        nodes.append(low * math.tan(amplitude) ** 2)
    return nodes
