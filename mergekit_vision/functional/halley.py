"""Polar factors by products and Cholesky factorizations alone, which a GPU with fast float64 does at full speed.

Halley's iteration ``X (a I + b XᵀX) (I + c XᵀX)^{-1}``, with the weights that are best for the smallest singular value that is
left, converges from any condition number in six steps at most.
Source: Nakatsukasa, Bai and Gygi, "Optimizing Halley's Iteration for Computing the Matrix Polar Decomposition" (SIMAX 2010).
"""

import time
from functools import cache
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_vision.functional.gram import gram

TOLERANCE = 1e-7
"""Least share of the largest singular value that the smallest may be. Down to there the Cholesky factors of the first step lose
seven to nine digits of sixteen; below, an eigendecomposition has to tell small singular values from zero."""
ITERATIONS = 8
"""Of the power method, which from nearly any start finds an extreme singular value up to a factor well below :data:`MARGIN`."""
MARGIN = 2.0
STEPS = 6
CONVERGED = 1e-5
"""Distance of the smallest singular value from 1 after which one more step, of cubic convergence, leaves rounding alone."""
RATE = 0.25
"""Speed of float64 products, in that of float32 ones, from which this is faster than an eigendecomposition: it is a half and more
on cards for servers, and a 32nd or 64th on others."""
REPEATS = 5
"""Of which the fastest counts: other threads' work may come between."""

_measuring = Lock()


class Polar(NamedTuple):
    """Polar factor of a matrix.

    Attributes:
        factor: ``U Vᵀ`` of the thin SVD ``U Σ Vᵀ``, without the null directions; in the shape of the matrix.
        nuclear_norm: sum of the singular values, without null ones.
    """

    factor: Tensor
    nuclear_norm: float


def polar_by_halley(M: Tensor, tol: float = TOLERANCE) -> Polar | None:
    """Polar factor of a matrix of full rank; ``None`` where singular values may be null.

    Args:
        M: ``[m, n]``, float64.
        tol: singular values up to this share of the largest, or of :data:`TOLERANCE` where that is more, may be null.

    >>> found = polar_by_halley(torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0]]).double())
    >>> found.factor.round(decimals=6), round(found.nuclear_norm, 6)
    (tensor([[0., 1.],
            [1., 0.],
            [0., 0.]], dtype=torch.float64), 3.0)
    """
    if M.shape[0] < M.shape[1]:
        found = polar_by_halley(M.T, tol)
        return None if found is None else Polar(found.factor.T, found.nuclear_norm)
    G = gram(M)
    least, largest = _extreme_singular_values(G)
    if not 0 < max(tol, TOLERANCE) * largest < least:  # a matrix without entries has no least one
        return None
    size = MARGIN * largest
    X, least = _step(M / size, G / size**2, least / (MARGIN * size))
    for _ in range(STEPS - 1):
        done = 1 - least < CONVERGED
        X, least = _step(X, gram(X), least)
        if done:
            break
    return Polar(X, float(torch.dot(X.flatten(), M.flatten())))


def _step(X: Tensor, G: Tensor, least: float) -> tuple[Tensor, float]:
    """One step for singular values in ``[least, 1]``, and the least of the result; ``G`` is ``XᵀX``, and overwritten."""
    square = least**2
    root = (4 * (1 - square) / square**2) ** (1 / 3)
    a = (1 + root) ** 0.5 + 0.5 * (8 - 4 * root + 8 * (2 - square) / (square * (1 + root) ** 0.5)) ** 0.5
    b = (a - 1) ** 2 / 4
    c = a + b - 1
    inner = G.mul_(c)
    inner.diagonal().add_(1)
    rest = torch.cholesky_solve(X.T, torch.linalg.cholesky_ex(inner)[0]).T
    return torch.add(X * (b / c), rest, alpha=a - b / c), min(1.0, least * (a + b * square) / (1 + c * square))


def _extreme_singular_values(G: Tensor) -> tuple[float, float]:
    """The least and the largest, by iteration on the Gram matrix; the least is 0 where that has no Cholesky factor."""
    L, failed = torch.linalg.cholesky_ex(G)
    x = y = torch.randn(len(L), 1, generator=torch.Generator().manual_seed(0)).to(L)
    for _ in range(ITERATIONS):
        x, y = torch.cholesky_solve(x / x.norm(), L), G @ (y / y.norm())
    least, largest, failed = torch.stack([x.norm() ** -0.5, y.norm().sqrt(), failed.to(G)]).tolist()
    return (0.0 if failed else least), largest


def pays(M: Tensor) -> bool:
    """Whether :func:`polar_by_halley` is the way to polar factors where a matrix is: on a GPU with fast float64."""
    if M.device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return False
    with _measuring:
        return has_fast_double(M.device)


@cache
def has_fast_double(device: torch.device, side: int = 1024) -> bool:
    """Whether a device multiplies in float64 at :data:`RATE` of its speed in float32 at least; measured once in a process."""
    single, double = (_seconds(torch.eye(side, dtype=dtype, device=device)) for dtype in (torch.float32, torch.float64))
    return single > RATE * double


def _seconds(A: Tensor) -> float:
    """Time of a product, after one that loads libraries."""
    (A @ A)[0, 0].item()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(3):
            product = A @ A
        product[0, 0].item()  # the host goes ahead until it asks for a number
        times.append(time.perf_counter() - start)
    return min(times)
