"""Polar factors of large float32 matrices by Newton's iteration.

An eigendecomposition of a Gram matrix must be made in float64, and for a side of thousands it is slow. Newton's iteration works
on the matrix itself, so that float32 is as accurate as a float32 SVD, and takes five or six inversions.
Source: Higham, "Computing the Polar Decomposition—with Applications" (SISSC 1986); the scaling of Byers and Xu, "A New Scaling
for Newton's Iteration for the Polar Decomposition and its Backward Stability" (SIMAX 2008), eq. 3.
"""

import math

import torch
from torch import Tensor

SIDE = 1024
"""Smaller side from which the iteration is faster than an eigendecomposition in float64."""
CONDITION = 1e7
"""Condition number beyond which float32 cannot tell small singular values from zero."""
LAST_STEP = 1e-2
"""Relative change below which one more step would change nothing: the iteration converges quadratically."""
MOST_STEPS = 20


def newton_polar(M: Tensor) -> Tensor | None:
    """Polar factor of a large float32 matrix of full rank, or ``None`` where this is not the way to it.

    Args:
        M: ``[m, n]``, of any shape and dtype.

    Returns:
        ``U Vᵀ`` of the thin SVD, ``[m, n]``, to about ``1e-7 * cond(M)`` in the weakest direction; ``None`` for float64, for a
        smaller side under :data:`SIDE`, and for a condition number beyond :data:`CONDITION`.
    """
    if M.dtype != torch.float32 or min(M.shape) < SIDE:
        return None
    if M.shape[0] < M.shape[1]:
        factor = newton_polar(M.T)
        return None if factor is None else factor.T
    if M.shape[0] == M.shape[1]:
        return _square(M)
    Q, R = torch.linalg.qr(M)
    inner = _square(R)
    return None if inner is None else Q @ inner


def _square(X: Tensor) -> Tensor | None:
    """Polar factor of a square matrix.

    With all singular values in [low, high], one step ``(z X + X^{-T} / z) / 2``, ``z = 1 / sqrt(low high)``, takes them to
    [1, (r + 1/r) / 2], ``r = sqrt(high / low)``.
    """
    inverse = _inverse_transpose(X)
    if inverse is None:
        return None
    low, high = 1 / spectral_norm(inverse), spectral_norm(X)
    if not high / low < CONDITION:
        return None
    for _ in range(MOST_STEPS):
        scale, root = 1 / math.sqrt(low * high), math.sqrt(high / low)
        following = inverse.mul_(0.5 / scale).add_(X, alpha=0.5 * scale)
        low, high = 1.0, max((root + 1 / root) / 2, 1 + 1e-12)
        if high - 1 < 1e-6 and float((following - X).norm() / following.norm()) < LAST_STEP:
            return following
        X, inverse = following, _inverse_transpose(following)
        if inverse is None:
            return None
    return None


def _inverse_transpose(X: Tensor) -> Tensor | None:
    inverse, info = torch.linalg.inv_ex(X.T)  # of the transpose, whose layout LAPACK takes as it is
    return inverse.contiguous() if not info.any() and torch.linalg.vector_norm(inverse, torch.inf).isfinite() else None


def spectral_norm(X: Tensor, steps: int = 8) -> float:
    """Largest singular value of a square matrix, a few percent too large or too small: good enough to scale by."""
    vector = torch.ones(len(X), dtype=X.dtype, device=X.device)
    vector[::2] = -0.5
    for _ in range(steps):
        vector = X @ (X.T @ (vector / vector.norm()))
    return float(vector.norm().sqrt())
