"""The polar factor of a large float32 matrix, times columns.

``polar(M) = M (MᵀM)^{-1/2}``, and partial fractions apply an inverse root to some columns at a fraction of the price of the whole
factor. A float32 Gram matrix can hold only a condition number of some hundreds, while a square matrix of thousands of random
columns has ten thousand and more. But few of its singular values are small, and the polar factor does not depend on singular
values at all: the smallest are found by inverse iteration on the matrix itself and raised to the size of the next.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_vision.functional.gram import gram
from mergekit_vision.functional.newton import CONDITION, SIDE, newton_polar, spectral_norm
from mergekit_vision.functional.zolotarev import root_products

RAISED = 64
"""Singular values that are raised at most; inverse iteration runs on a space of twice as many directions."""
WANTED_CONDITION = 100.0
"""Condition number at which no more singular values need be raised."""
ITERATIONS = 5
"""Steps of inverse iteration: each divides what is missing by the square of a ratio of singular values, here about 4."""
RAISED_CONDITION = 300.0
"""Condition number after raising beyond which the Gram matrix would not do in float32."""
TOLERANCE = 1e-5
"""Of the partial fractions; about what float32 leaves of the other steps."""
ERROR = 5e-5
"""Root-mean-square error of the factor's directions, as the checks bound it, beyond which Newton's iteration is taken."""


class PolarColumns(NamedTuple):
    """What a polar factor does to some columns.

    Attributes:
        product: ``polar(M) @ Z``.
        nuclear_norm: sum of the singular values of ``M``.
    """

    product: Tensor
    nuclear_norm: float


class _Smallest(NamedTuple):
    """The smallest singular values ``[j]`` of a square matrix, smallest first, with their vectors, and the next value."""

    U: Tensor
    S: Tensor
    V: Tensor
    following: float


def is_large(M: Tensor) -> bool:
    """Whether :func:`polar_columns` is the way to the polar factor of a matrix: float32, with a smaller side of 1024 or more."""
    return M.dtype == torch.float32 and min(M.shape) >= SIDE


def polar_columns(M: Tensor, Z: Tensor) -> PolarColumns | None:
    """``polar(M) @ Z`` for a large float32 matrix of full rank.

    Args:
        M: ``[m, n]``, float32.
        Z: ``[n, k]``, float32.

    Returns:
        The product, ``[m, k]``, within :data:`ERROR` or what Newton's iteration reaches, and the nuclear norm to a tenth of that;
        ``None`` for a condition number beyond :data:`~mergekit_vision.functional.newton.CONDITION`.
    """
    if M.shape[0] > M.shape[1]:
        Q, R = torch.linalg.qr(M)
        inner = polar_columns(R, Z)
        return None if inner is None else PolarColumns(Q @ inner.product, inner.nuclear_norm)
    if M.shape[0] < M.shape[1]:
        Q, R = torch.linalg.qr(M.T)
        return polar_columns(R.T, Q.T @ Z)
    return _by_newton(M, Z) if Z.shape[1] > len(M) else _square(M, Z)


def _square(M: Tensor, Z: Tensor) -> PolarColumns | None:
    """Of a square matrix and no more columns than it has; for more, the factor itself is cheaper."""
    high = 1.1 * spectral_norm(M)
    smallest = _smallest(M, high)
    if smallest is None:
        return None
    found = _by_fractions(M, Z, high, smallest) if high < RAISED_CONDITION * smallest.following else None
    return _by_newton(M, Z) if found is None else found


def _by_newton(M: Tensor, Z: Tensor) -> PolarColumns | None:
    factor = newton_polar(M)
    return None if factor is None else PolarColumns(factor @ Z, float((factor * M).sum(dtype=torch.float64)))


def _by_fractions(M: Tensor, Z: Tensor, high: float, smallest: _Smallest) -> PolarColumns | None:
    """By raising and partial fractions; ``None`` where a check finds the result not exact enough."""
    U, S, V, following = smallest
    raised_by = following - S
    missed = ((M.T @ U - V * S) * (raised_by / following)).norm() / following  # what inverse iteration has not separated
    if not float(missed) <= 2 * ERROR * len(M) ** 0.5:  # of which at most half reaches the factor
        return None
    raised, low = M.addmm(U * raised_by, V.T), 0.95 * following
    columns, root = root_products(gram(raised), Z, low**2, high**2, TOLERANCE)
    product, before = raised @ columns, gram(Z)
    off = gram(product).sub_(before).norm()  # an orthogonal factor keeps scalar products
    if not float(off) <= 2 * ERROR * (Z.shape[1] / len(M)) ** 0.5 * float(before.norm()):
        return None
    return PolarColumns(product, root - float(raised_by.sum(dtype=torch.float64)))


def _smallest(M: Tensor, high: float) -> _Smallest | None:
    """Those to raise, by inverse iteration from a fixed start; ``None`` for a condition number beyond :data:`CONDITION`."""
    n, most = len(M), min(RAISED, len(M) // 4)
    LU, pivots, failed = torch.linalg.lu_factor_ex(M)
    if failed:
        return None
    V = torch.randn(n, 2 * most, generator=torch.Generator().manual_seed(0)).to(M)
    for _ in range(ITERATIONS - 1):
        U = torch.linalg.qr(torch.linalg.lu_solve(LU, pivots, V, adjoint=True)).Q
        V = torch.linalg.qr(torch.linalg.lu_solve(LU, pivots, U)).Q
    exact = M.double()  # for the last step: how far its solutions are rounded, the vectors are off
    U = torch.linalg.qr(_refined(exact.T, V, partial(torch.linalg.lu_solve, LU, pivots, adjoint=True))).Q
    V, R = torch.linalg.qr(_refined(exact, U, partial(torch.linalg.lu_solve, LU, pivots)))
    if not R.isfinite().all():
        return None
    A, inverses, Bh = torch.linalg.svd(R)
    S = inverses.reciprocal()
    if not high < CONDITION * float(S[0]):
        return None
    raised = min(most, int((high > WANTED_CONDITION * S).sum()))
    return _Smallest(U @ Bh[:raised].T, S[:raised], V @ A[:, :raised], float(S[raised]))


def _refined(A: Tensor, B: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
    """The solution of ``A X = B`` with one step of iterative refinement: ``A`` in float64, ``B`` and ``solve`` in float32."""
    X = solve(B)
    return X + solve((B - A @ X.double()).to(B))
