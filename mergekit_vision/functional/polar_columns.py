"""The polar factor of a large float32 matrix, times columns.

``polar(M) = M (MᵀM)^{-1/2}``. The inverse root of a Gram matrix must be found in float64, and for a side of thousands an
eigendecomposition is slow. In band form ``M = Q B Pᵀ`` the Gram matrix is a narrow band as well, so that float64 is cheap, and
``polar(M) = Q polar(B) Pᵀ``. The reflections are made in float32, as accurately as a float32 singular value decomposition's.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_vision.functional.banded import Band, BandForm
from mergekit_vision.functional.zolotarev import InverseRoot

SIDE = 1024
"""Smaller side from which this is faster than an eigendecomposition in float64."""
CONDITION = 1e7
"""Condition number beyond which float32 cannot tell small singular values from zero."""
TOGETHER = 6
"""Partial fractions whose factors are made at once: enough to make few calls, and in the processor's cache."""
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
    """Whether :func:`polar_columns` is the way to the polar factor of a matrix: float32, with a smaller side of 1024 or more.

    Not on an accelerator, which must be told to start each of some thousand small steps.
    """
    return M.dtype == torch.float32 and min(M.shape) >= SIDE and M.device.type == "cpu"


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


class _Blocks(NamedTuple):
    """Blocks ``[b, k]`` of matrices ``X``, ``Y`` and ``Z``. What one product needs lies side by side in memory.

    Attributes:
        X: its blocks.
        Y: likewise.
        of_y_and_z: for each ``i``, block ``i - 1`` of ``Y`` above block ``i`` of ``Z``.
        of_x_and_y: block ``i + 1`` of ``X`` above block ``i`` of ``Y``.
    """

    X: list[Tensor]
    Y: list[Tensor]
    of_y_and_z: list[Tensor]
    of_x_and_y: list[Tensor]

    @classmethod
    def of(cls, Z: Tensor, sizes: Sequence[int]) -> "_Blocks":
        """With a copy of ``Z``, and zeros for the others."""
        zs = torch.split(Z, list(sizes))
        rows = [
            torch.cat([torch.zeros_like(z), Z.new_zeros(size, Z.shape[1]), z]) for size, z in zip([0, *sizes], zs, strict=False)
        ]
        tops = [*(row[: len(row) - len(z)] for row, z in zip(rows[1:], zs[1:], strict=True)), torch.zeros_like(zs[-1])]
        return cls(
            X=[row[: len(z)] for row, z in zip(rows, zs, strict=True)],
            Y=[top[len(top) - len(z) :] for top, z in zip(tops, zs, strict=True)],
            of_y_and_z=[row[len(z) :] for row, z in zip(rows, zs, strict=True)],
            of_x_and_y=tops,
        )


def _root_products(B: Band, Z: Tensor, root: InverseRoot) -> tuple[Tensor, float]:
    """``(BᵀB)^{-1/2} Z`` and the trace of ``(BᵀB)^{1/2}``, float64, by Cholesky factors ``L Lᵀ`` of the shifted ``BᵀB``.

    ``L Y = Z`` and ``Lᵀ X = Y`` are solved block by block.
    """
    sums, nuclear_norm, blocks = torch.zeros_like(Z), root.constant * len(Z), _Blocks.of(Z, B.sizes)
    for start in range(0, len(root.shifts), TOGETHER):
        shifts, weights = root.shifts[start : start + TOGETHER], root.weights[start : start + TOGETHER]
        forth, back, logarithms = _substitutions(B, Z.new_tensor(shifts))
        backward = list(zip(back, blocks.of_x_and_y, blocks.X, torch.split(sums, B.sizes), strict=True))[::-1]
        for fraction, weight in enumerate(weights):
            for factors, pair, y in zip(forth, blocks.of_y_and_z, blocks.Y, strict=True):
                torch.mm(factors[fraction], pair, out=y)
            for factors, pair, x, total in backward:
                total.add_(torch.mm(factors[fraction], pair, out=x), alpha=weight)
        logarithms -= len(Z) * Z.new_tensor(shifts).log()
        nuclear_norm += float(logarithms @ Z.new_tensor(weights)) / 2
    return sums, nuclear_norm


def _substitutions(B: Band, shifts: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Block substitution by the Cholesky factors ``L`` of ``BᵀB + s I``, for each shift.

    Returns:
        For each block of ``L Y = Z``, what multiplies block ``i - 1`` of ``Y`` above block ``i`` of ``Z``,
        ``[shifts, b, b' + b]``; for each of ``Lᵀ X = Y``, what multiplies block ``i + 1`` of ``X`` above block ``i`` of ``Y``;
        and the logarithms of the determinants of ``BᵀB + s I``, ``[shifts]``.
    """
    forth, back, logarithms = list[Tensor](), list[Tensor](), torch.zeros_like(shifts)
    schur, below = torch.zeros(()), shifts.new_zeros(len(shifts), len(B.diagonal[0]), 0)
    for block, above in zip_longest(B.diagonal, B.above):
        eye = torch.eye(len(block), dtype=block.dtype, device=block.device)
        L = torch.linalg.cholesky_ex(block.T @ block - schur + shifts[:, None, None] * eye)[0]
        logarithms += 2 * L.diagonal(dim1=1, dim2=2).log().sum(1)
        inverse = torch.linalg.solve_triangular(L, eye.expand_as(L), upper=False)
        forth.append(torch.cat([-inverse @ below, inverse], 2))
        across = inverse @ (block.T @ (block.new_zeros(len(block), 0) if above is None else above))
        back.append(torch.cat([-inverse.mT @ across, inverse.mT], 2))
        below = across.mT
        schur = below @ across - (0 if above is None else above.T @ above)
    return forth, back, logarithms
