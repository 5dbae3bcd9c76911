"""Polar factors and leading singular triplets through the smaller Gram matrix, in float64.

A Gram matrix squares the condition number: in float32 that costs up to 1e-2 in a merged matrix, in float64 about 1e-6, at a
fraction of the price of a singular value decomposition. Every function takes float32 or float64 and answers in the same dtype,
if it is not asked for another.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_vision.functional.eigen import eigh
from mergekit_vision.functional.gram import gram
from mergekit_vision.functional.halley import Polar, pays, polar_by_halley
from mergekit_vision.functional.leading import leading_eigenpairs
from mergekit_vision.functional.polar_columns import is_large, polar_columns
from mergekit_vision.functional.threads import in_threads

GRAM_TOLERANCE = 1e-7
"""Singular values below this share of the largest are round-off when they come from a float64 Gram matrix."""
MILD = 100.0
"""Condition number up to which a polar factor may be multiplied out in float32: it is as exact then as by a singular value
decomposition in float32, whose error grows with the condition number too."""


class PolarProduct(NamedTuple):
    """Product of two polar factors.

    Attributes:
        product: ``polar(left) @ diag(diagonal) @ polar(right)``, ``[m, n]``.
        left_mean: mean of the thin singular values of the left matrix.
        right_mean: mean of the thin singular values of the right matrix.
    """

    product: Tensor
    left_mean: float
    right_mean: float


class TopSVD(NamedTuple):
    """Leading singular triplets, largest first: ``M ≈ U @ diag(S) @ Vh``.

    Attributes:
        U: ``[m, k]``.
        S: ``[k]``.
        Vh: ``[k, n]``.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor


class _Whitener(NamedTuple):
    """Inverse square root of a matrix's smaller Gram: ``(M Mᵀ)^{-1/2}`` of a wide ``M``, else ``(Mᵀ M)^{-1/2}``.

    It is zero on the null directions, whose singular vectors an SVD picks at random.
    """

    vectors: Tensor
    gains: Tensor
    wide: bool
    nuclear_norm: float

    @classmethod
    def of(cls, M: Tensor, tol: float) -> "_Whitener":
        wide = M.shape[0] < M.shape[1]
        values, vectors = eigh(gram(M.T if wide else M))
        s = values.clamp(min=0).sqrt()
        null = int((s <= tol * s[-1:]).sum())  # the first ones: they ascend
        s = s[null:]
        return cls(vectors[:, null:], s.reciprocal(), wide, float(s.sum()))

    def rounded(self, dtype: torch.dtype) -> "_Whitener":
        """The same in that dtype, or as it is where a polar factor would suffer from it."""
        if dtype == self.vectors.dtype or (len(self.gains) and float(self.gains[0] / self.gains[-1]) > MILD):
            return self
        return self._replace(vectors=self.vectors.to(dtype), gains=self.gains.to(dtype))

    @property
    def root(self) -> Tensor:
        """The inverse root itself."""
        return gram((self.vectors * self.gains.sqrt()).T)

    def times(self, X: Tensor) -> Tensor:
        """The inverse root times ``X``, in the cheaper order."""
        if self._forms_root(X.shape[1]):
            return self.root @ X
        return self.vectors @ (self.gains[:, None] * (self.vectors.T @ X))

    def _forms_root(self, columns: int) -> bool:
        """Whether so many columns are multiplied by the root with fewer operations, those that form it included."""
        n, k = self.vectors.shape
        return n * k + 2 * n * columns < 4 * k * columns

    def polar(self, M: Tensor) -> Tensor:
        """Polar factor of the matrix ``M`` that this was made of."""
        M = M.to(self.vectors)
        if self.wide:
            return self.times(M)
        return M @ self.root if self._forms_root(len(M)) else self.times(M.T).T


def polar(M: Tensor, tol: float = GRAM_TOLERANCE, dtype: torch.dtype | None = None) -> Polar:
    """Polar factor and nuclear norm of a matrix, mostly by an eigendecomposition of its smaller Gram matrix.

    The error is about ``1e-16 * cond(M)**2``, besides that of the last products; on a GPU with fast float64, where Halley's
    iteration takes its place, less. Null directions get gain zero, so that the result is unique.

    Args:
        M: ``[m, n]``, float32 or float64.
        tol: singular values up to this share of the largest count as zero.
        dtype: float32 or float64: of the factor and, where the condition number is no more than :data:`MILD`, of the last
            products, which are otherwise made in float64. ``None`` rounds to the dtype of ``M`` in the end.

    Returns:
        The factor, and the nuclear norm without null directions.

    >>> polar(torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]]))
    Polar(factor=tensor([[1., 0.],
            [0., 1.],
            [0., 0.]]), nuclear_norm=5.0)
    """
    found = _polar(M.double(), tol, dtype or torch.float64)
    return Polar(found.factor.to(dtype or M.dtype), found.nuclear_norm)


def _polar(M: Tensor, tol: float, dtype: torch.dtype = torch.float64) -> Polar:
    """The same of a float64 matrix, the last products in a dtype."""
    if pays(M) and (found := polar_by_halley(M, tol)) is not None:
        return found
    whitener = _Whitener.of(M, tol)
    return Polar(whitener.rounded(dtype).polar(M), whitener.nuclear_norm)


def polar_product(left: Tensor, right: Tensor, diagonal: Tensor | None = None, tol: float = GRAM_TOLERANCE) -> PolarProduct:
    """Product of the polar factors of two matrices, with an optional diagonal between them.

    The left factor is formed by :mod:`~mergekit_vision.functional.halley` alone. Otherwise what takes its place is applied to the
    right one, which has fewer columns in every use here: an inverse root of the smaller Gram matrix in float64, or, of a large
    float32 matrix, what :mod:`~mergekit_vision.functional.polar_columns` does.

    Args:
        left: ``[m, p]``, float32 or float64.
        right: ``[p, n]``, same dtype.
        diagonal: ``[p]``; the identity where ``None``.
        tol: as for :func:`polar`.

    Returns:
        The product in the dtype of ``left``, and the mean thin singular values of both matrices.
    """
    R = right.double()
    if is_large(left):
        of_right = _Whitener.of(R, tol)
        found = polar_columns(left, _scaled(of_right.polar(R), diagonal).to(left.dtype))
        if found is not None:
            return PolarProduct(found.product, _mean(found.nuclear_norm, left), _mean(of_right.nuclear_norm, R))
    L = left.double()
    if pays(L):
        left_polar, right_polar = in_threads(lambda M: _polar(M, tol), (L, R))
        product = left_polar.factor @ _scaled(right_polar.factor, diagonal)
        return PolarProduct(product.to(left.dtype), _mean(left_polar.nuclear_norm, L), _mean(right_polar.nuclear_norm, R))
    of_right, of_left = in_threads(lambda M: _Whitener.of(M, tol), (R, L))
    if of_right.wide and not of_left.wide:  # the roots are the smaller matrices, and meet in the middle
        product = L @ of_left.times(_scaled(of_right.root, diagonal)) @ R
    else:
        inner = _scaled(of_right.polar(R), diagonal)
        product = of_left.times(L @ inner) if of_left.wide else L @ of_left.times(inner)
    return PolarProduct(product.to(left.dtype), _mean(of_left.nuclear_norm, L), _mean(of_right.nuclear_norm, R))


def _scaled(M: Tensor, diagonal: Tensor | None) -> Tensor:
    return M if diagonal is None else diagonal.double()[:, None] * M


def _mean(nuclear_norm: float, M: Tensor) -> float:
    return nuclear_norm / max(1, min(M.shape))


def top_svd(M: Tensor, k: int, tol: float = GRAM_TOLERANCE) -> TopSVD:
    """The ``k`` leading singular triplets of a matrix, by an eigendecomposition of its smaller Gram matrix.

    Args:
        M: ``[m, n]``, float32 or float64.
        k: how many triplets; at least 0.
        tol: singular values up to this share of the largest count as zero.

    Returns:
        ``min(k, numerical rank)`` triplets in the dtype of ``M``; signs are arbitrary.

    >>> top_svd(torch.diag(torch.tensor([1.0, 3.0, 0.0])), k=3).S
    tensor([3., 1.])
    """
    matrix = M.double()
    wide = M.shape[0] < M.shape[1]
    A = matrix.T if wide else matrix
    values, vectors = leading_eigenpairs(gram(A), k)
    s = values.clamp(min=0).sqrt()
    s = s[s > tol * s[:1]]
    V = vectors[:, : len(s)]
    U = A @ V / s
    if wide:
        U, V = V, U
    return TopSVD(U.to(M.dtype), s.to(M.dtype), V.T.to(M.dtype))


def top_svd_of_product(up: Tensor, down: Tensor, k: int, tol: float = GRAM_TOLERANCE) -> TopSVD:
    """:func:`top_svd` of a product, by decompositions of its factors alone.

    Args:
        up: ``[m, r]``, float32 or float64.
        down: ``[r, n]``, same dtype.
        k: how many triplets; at least 0.
        tol: as for :func:`top_svd`.

    >>> top_svd_of_product(torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0, 2.0]]), k=2).S
    tensor([10.])
    """
    left, right = torch.linalg.qr(up.double()), torch.linalg.qr(down.double().T)
    U, s, Vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    s = s[:k]
    s = s[s > tol * s[:1]]
    found = left.Q @ U[:, : len(s)], s, Vh[: len(s)] @ right.Q.T
    return TopSVD(*(part.to(up.dtype) for part in found))


def pad_rank(factors: Tensor, rank: int, dim: int) -> Tensor:
    """``factors`` cut to, or filled up with zeros to, ``rank`` along ``dim``; zero factors add nothing."""
    kept = factors.narrow(dim, 0, min(rank, factors.shape[dim]))
    shape = list(kept.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([kept, kept.new_zeros(shape)], dim)
