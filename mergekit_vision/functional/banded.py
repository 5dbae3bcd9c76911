"""Square matrices in band form, by reflections from both sides.

``M = Q B Pᵀ`` with ``Q`` and ``P`` orthogonal takes as long as two products of such matrices, being products for the most part,
and to divide by the narrow band ``B`` costs next to nothing. Unlike a Gram matrix, the band keeps the condition number.
Source: the first stage of Großer and Lang, "Efficient Parallel Reduction to Bidiagonal Form" (Parallel Computing 1999), with
reflections in blocks as in Schreiber and Van Loan (SISSC 1989).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 48
"""Side of the band's blocks: enough to keep products at full speed; dividing by the band costs in proportion."""
STEPS = 8
"""Of inverse iteration: they find a smallest singular value that is half the next one from nearly any start."""


class Reflection(NamedTuple):
    """The orthogonal matrix ``I - V R Vᵀ``, on the rows from ``start`` on.

    Attributes:
        start: first row that it acts on.
        V: ``[rows, b]``.
        R: ``[b, b]``, upper triangular.
    """

    start: int
    V: Tensor
    R: Tensor

    def apply_(self, X: Tensor, adjoint: bool = False) -> None:
        """Multiply ``X [n, k]`` by the matrix, or by its transpose, from the left and in place."""
        rows = X[self.start :]
        rows.addmm_(self.V, (self.R.T if adjoint else self.R) @ (self.V.T @ rows), alpha=-1)


class Band(NamedTuple):
    """A square matrix whose only blocks are those on the diagonal and those beside them to the right.

    Attributes:
        diagonal: upper triangular, ``[b, b]``; the last may be smaller.
        above: ``above[i]`` is to the right of ``diagonal[i]``; one fewer.
    """

    diagonal: Sequence[Tensor]
    above: Sequence[Tensor]

    @property
    def sizes(self) -> list[int]:
        """Rows of each block."""
        return [len(block) for block in self.diagonal]

    def double(self) -> "Band":
        """The same in float64."""
        return Band([block.double() for block in self.diagonal], [block.double() for block in self.above])

    def times(self, X: Tensor) -> Tensor:
        """The band times ``X [n, k]``."""
        parts = torch.split(X, self.sizes)
        products = [block @ part for block, part in zip(self.diagonal, parts, strict=True)]
        for product, block, part in zip(products, self.above, parts[1:], strict=False):
            product.addmm_(block, part)
        return torch.cat(products)

    def singular_values_within(self) -> tuple[float, float]:
        """Bounds of the singular values; the lower one, by inverse iteration, is not a number, or 0, of a singular band.

        The upper bound is at most twice the largest singular value, and the lower one at least half the smallest; that the latter
        is below the smallest is all but certain.
        """
        n = sum(self.sizes)
        X = torch.randn(n, 1, generator=torch.Generator().manual_seed(0)).to(self.diagonal[0])
        least = math.nan
        for _ in range(STEPS):
            X = self._divided(self._divided_adjoint(X / X.norm()))
            least = float(X.norm()) ** -0.5 if X.any() else math.nan
        if not 0 < least < math.inf:
            return least, math.inf
        norms = ([float(torch.linalg.matrix_norm(block, 2)) for block in blocks] for blocks in self)
        return 0.5 * least, sum(max(found, default=0.0) for found in norms)

    def _divided(self, X: Tensor) -> Tensor:
        """``B^{-1} X``."""
        parts = list(torch.split(X, self.sizes))
        for i in reversed(range(len(parts))):
            rest = parts[i] - self.above[i] @ parts[i + 1] if i < len(self.above) else parts[i]
            parts[i] = torch.linalg.solve_triangular(self.diagonal[i], rest, upper=True)
        return torch.cat(parts)

    def _divided_adjoint(self, X: Tensor) -> Tensor:
        """``B^{-T} X``."""
        parts = list(torch.split(X, self.sizes))
        for i in range(len(parts)):
            rest = parts[i] - self.above[i - 1].T @ parts[i - 1] if i else parts[i]
            parts[i] = torch.linalg.solve_triangular(self.diagonal[i].T, rest, upper=False)
        return torch.cat(parts)


class BandForm(NamedTuple):
    """``M = Q B Pᵀ``; ``Q`` and ``P`` are products of reflections, the first one leftmost.

    Attributes:
        band: ``B``.
        left: of ``Q``.
        right: of ``P``.
    """

    band: Band
    left: Sequence[Reflection]
    right: Sequence[Reflection]

    @classmethod
    def of(cls, M: Tensor, block: int = BLOCK) -> "BandForm":
        """Band form of a matrix ``[n, n]`` with blocks of that side.

        >>> form = BandForm.of(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), block=1)
        >>> form.left_times(form.band.times(form.right_adjoint_times(torch.eye(2)))).round(decimals=4).abs()
        tensor([[1., 2.],
                [3., 4.]])
        """
        A, n = M.clone(), len(M)
        diagonal, above, left, right = list[Tensor](), list[Tensor](), list[Reflection](), list[Reflection]()
        for start in range(0, n, block):
            stop = min(start + block, n)
            Q, corner = _reflection(start, A[start:, start:stop])
            diagonal.append(corner)
            left.append(Q)
            if stop == n:
                break
            head, below, rest = Q.V[: stop - start], Q.V[stop - start :], A[stop:, stop:]
            W = Q.R.T @ (Q.V.T @ A[start:, stop:])
            P, corner = _reflection(stop, torch.addmm(A[start:stop, stop:], head, W, alpha=-1).T)
            above.append(corner.T)
            right.append(P)
            Y = torch.addmm(rest @ P.V, below, W @ P.V, alpha=-1) @ P.R
            rest.addmm_(torch.cat([below, Y], 1), torch.cat([W, P.V.T]), alpha=-1)  # from both sides at once
        return cls(Band(diagonal, above), left, right)

    def left_times(self, X: Tensor) -> Tensor:
        """``Q X`` of ``X [n, k]``."""
        X = X.clone()
        for reflection in reversed(self.left):
            reflection.apply_(X)
        return X

    def right_adjoint_times(self, X: Tensor) -> Tensor:
        """``Pᵀ X`` of ``X [n, k]``."""
        X = X.clone()
        for reflection in self.right:
            reflection.apply_(X, adjoint=True)
        return X


def _reflection(start: int, panel: Tensor) -> tuple[Reflection, Tensor]:
    """The reflection that leaves of a panel ``[m, b]`` an upper triangle, and the triangle, ``[min(m, b), b]``."""
    packed, scales = torch.geqrf(panel)
    b = len(scales)
    V = packed[:, :b].tril(-1)
    V.diagonal().fill_(1.0)
    eye = torch.eye(b, dtype=V.dtype, device=V.device)
    R = torch.linalg.solve_triangular(eye + scales[:, None] * (V.T @ V).triu(1), torch.diag(scales), upper=True)
    return Reflection(start, V, R), packed[:b].triu()
