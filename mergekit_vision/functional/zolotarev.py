"""Inverse square roots by Zolotarev's partial fractions.

The best approximation of ``x**-0.5`` on an interval, in the relative sense, by ``r`` fractions ``w / (x + s)`` is known in
closed form, and its error falls exponentially with ``r``: of a matrix, one Cholesky factorization and one solution a fraction
take the place of an eigendecomposition. Its integral approximates the root, so that the determinants of the same factors give
the trace of the matrix's root.
Source: Zolotarev (1877), in the form of Nakatsukasa and Freund, "Computing Fundamental Matrix Decompositions Accurately via the
Matrix Sign Function in Two Iterations: The Power of Zolotarev's Functions" (SIAM Review 2016), section 3; Hale, Higham and
Trefethen, "Computing A^α, log(A), and Related Matrix Functions by Contour Integrals" (SINUM 2008).
"""

import math
from itertools import count
from typing import NamedTuple

import torch


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
        weights = [  # of ratios, as products of so many numbers overflow
            math.prod((zero - pole) / gap for zero, gap in zip(zeros, gaps, strict=True))
            for pole, gaps in zip(poles, others, strict=True)
        ]
        x = torch.logspace(math.log10(low), math.log10(high), 64 * r + 1, dtype=torch.float64)
        ratio = sum((w / (x + s) for s, w in zip(poles, weights, strict=True)), torch.zeros_like(x)) * x.sqrt()
        least, most = float(ratio.min()), float(ratio.max())
        weights = [2 * w / (least + most) for w in weights]  # as much too large as too small
        roots = torch.linspace(math.sqrt(low), math.sqrt(high), 1000, dtype=torch.float64)
        logs = (w / 2 * torch.log1p(roots**2 / s) for s, w in zip(poles, weights, strict=True))
        constant = float((roots - sum(logs, torch.zeros_like(x[:1]))).mean())
        return cls(tuple(poles), tuple(weights), constant, (most - least) / (most + least))


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
