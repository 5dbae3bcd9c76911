"""The polar factor of a large float32 matrix, times columns.

``polar(M) = M (MᵀM)^{-1/2}``. The inverse root of a Gram matrix must be found in float64, and for a side of thousands an
eigendecomposition is slow. In band form ``M = Q B Pᵀ`` the Gram matrix is a narrow band as well, so that float64 is cheap, and
``polar(M) = Q polar(B) Pᵀ``. The reflections are made in float32, as accurately as a float32 singular value decomposition's.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_vision.functional.banded import Band, BandForm
from mergekit_vision.functional.zolotarev import InverseRoot

SIDE = 1024
"""Smaller side from which this is faster than an eigendecomposition in float64."""
CONDITION = 1e7
"""Condition number beyond which float32 cannot tell small singular values from zero."""
TOLERANCE = 1e-6
"""Of the partial fractions; less than float32 leaves of the reflections."""


class PolarColumns(NamedTuple):
    """What a polar factor does to some columns.

    Attributes:
        product: ``polar(M) @ Z``.
        nuclear_norm: sum of the singular values of ``M``.
    """

    product: Tensor
    nuclear_norm: float


def is_large(M: Tensor) -> bool:
    """Whether :func:`polar_columns` is the way to the polar factor of a matrix: float32, with a smaller side of 1024 or more."""
    return M.dtype == torch.float32 and min(M.shape) >= SIDE


@torch.no_grad()
def polar_columns(M: Tensor, Z: Tensor) -> PolarColumns | None:
    """``polar(M) @ Z`` for a float32 matrix of full rank; gradients are not recorded.

    Args:
        M: ``[m, n]``, float32.
        Z: ``[n, k]``, float32.

    Returns:
        The product, ``[m, k]``, as accurate as by a float32 singular value decomposition, and the nuclear norm; ``None`` for a
        condition number beyond :data:`CONDITION`, by bounds of it that may be four times too large.
    """
    if M.shape[0] > M.shape[1]:
        Q, R = torch.linalg.qr(M)
        inner = polar_columns(R, Z)
        return None if inner is None else PolarColumns(Q @ inner.product, inner.nuclear_norm)
    if M.shape[0] < M.shape[1]:
        Q, R = torch.linalg.qr(M.T)
        return polar_columns(R.T, Q.T @ Z)
    form = BandForm.of(M)
    band = form.band.double()
    low, high = band.singular_values_within()
    if not high < CONDITION * low:
        return None
    root = InverseRoot.on(low**2, high**2, TOLERANCE)
    columns, trace = _root_products(band, form.right_adjoint_times(Z).double(), root)
    return PolarColumns(form.left_times(band.times(columns).to(Z)), trace)


def _root_products(B: Band, Z: Tensor, root: InverseRoot) -> tuple[Tensor, float]:
    """``(BᵀB)^{-1/2} Z`` and the trace of ``(BᵀB)^{1/2}``, float64, by Cholesky factors of the shifted ``BᵀB``, block by block.

    The inverses ``[fractions, b, b]`` of the factors' diagonal blocks take the place of solutions with many columns.
    """
    inverses, below, logarithms = _cholesky(B, Z.new_tensor(root.shifts))
    sums, X = torch.zeros_like(Z), torch.empty_like(Z)
    parts, totals, found = (torch.split(whole, B.sizes) for whole in (Z, sums, X))
    for fraction, weight in enumerate(root.weights):
        for i, part in enumerate(parts):
            rest = found[i].copy_(part)
            if i:
                rest.addmm_(below[i - 1][fraction], found[i - 1], alpha=-1)
            rest.copy_(inverses[i][fraction] @ rest)
        for i, total in reversed(list(enumerate(totals))):
            rest = found[i]
            if i < len(below):
                rest.addmm_(below[i][fraction].T, found[i + 1], alpha=-1)
            rest.copy_(inverses[i][fraction].T @ rest)
            total.add_(rest, alpha=weight)
    n = len(Z)
    terms = zip(root.shifts, root.weights, logarithms.tolist(), strict=True)
    return sums, root.constant * n + sum(weight / 2 * (log - n * math.log(shift)) for shift, weight, log in terms)


def _cholesky(B: Band, shifts: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Cholesky factors of ``BᵀB + s I`` for each shift.

    Returns:
        Inverses of their diagonal blocks, ``[shifts, b, b]``; the blocks below these, one fewer; and the logarithms of the
        determinants of ``BᵀB + s I``, ``[shifts]``.
    """
    inverses, below, logarithms = list[Tensor](), list[Tensor](), torch.zeros_like(shifts)
    schur = torch.zeros(())
    for i, block in enumerate(B.diagonal):
        eye = torch.eye(len(block), dtype=block.dtype, device=block.device)
        L = torch.linalg.cholesky_ex(block.T @ block - schur + shifts[:, None, None] * eye)[0]
        logarithms += 2 * L.diagonal(dim1=1, dim2=2).log().sum(1)
        inverses.append(torch.linalg.solve_triangular(L, eye.expand_as(L), upper=False))
        if i < len(B.above):
            across = inverses[-1] @ (block.T @ B.above[i])
            schur = across.mT @ across - B.above[i].T @ B.above[i]
            below.append(across.mT)
    return inverses, below, logarithms
