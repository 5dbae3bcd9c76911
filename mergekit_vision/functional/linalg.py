"""Polar factors and leading singular triplets through the smaller Gram matrix, in float64.

A Gram matrix squares the condition number: in float32 that costs up to 1e-2 in a merged matrix, in float64 about 1e-6, at a
fraction of the price of a singular value decomposition. Every function takes float32 or float64 and answers in the same dtype.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_vision.functional.newton import newton_polar
from mergekit_vision.functional.threads import in_threads

GRAM_TOLERANCE = 1e-7
"""Singular values below this share of the largest are round-off when they come from a float64 Gram matrix."""
GRAM_BLOCK = 256
"""Columns of a Gram matrix that are computed at once: enough to keep a product at full speed."""


class Polar(NamedTuple):
    """Polar factor of a matrix.

    Attributes:
        factor: ``U Vᵀ`` of the thin SVD ``U Σ Vᵀ``, without the null directions; shape and dtype of the matrix.
        nuclear_norm: sum of the singular values.
    """

    factor: Tensor
    nuclear_norm: float


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
        values, vectors = torch.linalg.eigh(gram(M.T if wide else M))
        s = values.clamp(min=0).sqrt()
        kept = (s > tol * s.amax()) if s.numel() else s.bool()
        return cls(vectors[:, kept], s[kept].reciprocal(), wide, float(s.sum()))

    def times(self, X: Tensor) -> Tensor:
        """The inverse root times ``X``, in the cheaper order."""
        if X.shape[1] > len(self.vectors):
            return (self.vectors * self.gains) @ self.vectors.T @ X
        return self.vectors @ (self.gains[:, None] * (self.vectors.T @ X))

    def polar(self, M: Tensor) -> Tensor:
        """Polar factor of the matrix ``M`` that this was made of."""
        return self.times(M) if self.wide else self.times(M.T).T


def gram(A: Tensor) -> Tensor:
    """``Aᵀ A`` of ``A [n, d]`` in its own dtype, computing little more than one triangle.

    >>> gram(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    tensor([[1., 2.],
            [2., 5.]])
    """
    if A.is_cuda:  # one large product is faster there
        return A.T @ A
    d = A.shape[1]
    G = A.new_empty(d, d)
    for start in range(0, d, GRAM_BLOCK):
        stop = min(start + GRAM_BLOCK, d)
        torch.mm(A[:, start:stop].T, A[:, start:], out=G[start:stop, start:])
        G[stop:, start:stop] = G[start:stop, stop:].T
    return G


def polar(M: Tensor, tol: float = GRAM_TOLERANCE) -> Polar:
    """Polar factor and nuclear norm of a matrix, by an eigendecomposition of its smaller Gram matrix.

    The error is about ``1e-16 * cond(M)**2``. Null directions get gain zero, so that the result is unique.

    Args:
        M: ``[m, n]``, float32 or float64.
        tol: singular values up to this share of the largest count as zero.

    Returns:
        The factor in the dtype of ``M``, and the nuclear norm.

    >>> polar(torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]]))
    Polar(factor=tensor([[1., 0.],
            [0., 1.],
            [0., 0.]]), nuclear_norm=5.0)
    """
    matrix = M.double()
    whitener = _Whitener.of(matrix, tol)
    return Polar(whitener.polar(matrix).to(M.dtype), whitener.nuclear_norm)


def polar_product(left: Tensor, right: Tensor, diagonal: Tensor | None = None, tol: float = GRAM_TOLERANCE) -> PolarProduct:
    """Product of the polar factors of two matrices, with an optional diagonal between them.

    The left factor is formed only where Newton's iteration finds it faster (:mod:`~mergekit_vision.functional.newton`: large, in
    float32); else its inverse root is applied to the right one, which has fewer columns in every use here.

    Args:
        left: ``[m, p]``, float32 or float64.
        right: ``[p, n]``, same dtype.
        diagonal: ``[p]``; the identity where ``None``.
        tol: as for :func:`polar`.

    Returns:
        The product in the dtype of ``left``, and the mean thin singular values of both matrices.
    """
    R, factor = right.double(), newton_polar(left)
    L = left.double() if factor is None else left
    roots = in_threads(lambda M: _Whitener.of(M, tol), (R, L) if factor is None else (R,))
    inner = roots[0].polar(R)
    if diagonal is not None:
        inner = diagonal.double()[:, None] * inner
    if factor is not None:
        nuclear_norm = float((factor * left).sum(dtype=torch.float64))
        product = factor @ inner.to(left.dtype)
    else:
        nuclear_norm = roots[1].nuclear_norm
        product = roots[1].times(L @ inner) if roots[1].wide else L @ roots[1].times(inner)
    means = (norm / max(1, min(M.shape)) for norm, M in ((nuclear_norm, L), (roots[0].nuclear_norm, R)))
    return PolarProduct(product.to(left.dtype), *means)


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
    values, vectors = torch.linalg.eigh(gram(A))
    s = values.clamp(min=0).sqrt().flip(0)[:k]
    s = s[s > tol * s[:1]]
    V = vectors.flip(1)[:, : len(s)]
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
