"""The leading eigenpairs of a large symmetric matrix in float64, at the price of float32.

Eigenvectors in float32 are right to about 1e-7 of the norm over the gaps. A step or two of perturbation theory, with products in
float64, squares that error, and a Rayleigh-Ritz projection sorts out what lies close together.
"""

import torch
from torch import Tensor

from mergekit_vision.functional.eigen import eigh

SIDE = 512
"""Side from which this pays, for at most a sixth of the eigenpairs."""
SHARE = 6
SMALLEST = 1e-5
"""Least size, over the largest, of eigenvalues that float32 tells from its rounding errors."""
GAP = 5e-6
"""Least gap below them, likewise: ten times the float32 entries that LAPACK takes for zero. With a smaller one the steps below
seldom suffice, and cost more than they save."""
NEXT = 8
"""Eigenvectors behind the leading ones that are looked at again: where gaps are small float32 may have put one of them there."""
STEPS = 2
ERROR = 1e-6
"""Bound of the angle between what is found and the space of the leading eigenvectors, by the residual; one step nearly always
falls below. That a task vector is rounded to float32 turns its leading singular vectors further."""


def leading_eigenpairs(G: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest eigenvalues of a positive semi-definite matrix, largest first, and their eigenvectors.

    Args:
        G: ``[n, n]``, float64.
        k: at most ``n``; at least 0.

    Returns:
        ``[k]`` and ``[n, k]``: the vectors span the leading eigenvectors' space up to an angle of :data:`ERROR`.

    >>> leading_eigenpairs(torch.diag(torch.tensor([1.0, 3.0, 2.0])).double(), k=2)[0]
    tensor([3., 2.], dtype=torch.float64)
    """
    k = min(k, len(G))
    # an accelerator's eigenvectors are no cheaper in float32, in which they may be off by far more than rounding
    if G.device.type == "cpu" and len(G) >= SIDE and 0 < k <= len(G) // SHARE and (found := _refined(G, k)) is not None:
        return found
    values, vectors = eigh(G)
    return values.flip(0)[:k], vectors[:, len(G) - k :].flip(1)


def _refined(G: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """By float32; ``None`` where that cannot tell the leading eigenvalues from the others, or from zero."""
    scale = G.diagonal().max().clamp(min=torch.finfo(G.dtype).tiny)  # float32 overflows where float64 does not
    values, vectors = (part.double() for part in eigh((G / scale).float()))
    rest, top, largest = values[:-k] * scale, values[-k:], values[-1]
    if not (float((top[0] - values[-k - 1]) / largest) > GAP and float(top[0] / largest) > SMALLEST):
        return None
    others, X = vectors[:, :-k], vectors[:, -k:]
    for _ in range(STEPS):
        GX = G @ X
        rates = (X * GX).sum(0) / X.square().sum(0)
        X = X + others @ ((others.T @ (GX - X * rates)) / (rates - rest[:, None]))
        if not X.isfinite().all():
            return None
        Q = torch.linalg.qr(X).Q
        GQ = G @ Q
        found, turn = eigh(Q.T @ GQ)
        X = Q @ turn
        gap = float(found[0] - _largest_outside(G, X, others[:, -NEXT:]))
        if gap > 0 and float((GQ @ turn - X * found).norm()) <= ERROR * gap:
            return found.flip(0), X.flip(1)
    return None


def _largest_outside(G: Tensor, X: Tensor, near: Tensor) -> Tensor:
    """The largest eigenvalue of ``G`` outside of the span of ``X``, as vectors ``near`` its eigenvector have it."""
    Q = torch.linalg.qr(near - X @ (X.T @ near)).Q
    return eigh(Q.T @ G @ Q)[0][-1]
