"""Essential Subspace Decomposition: the output directions in which a task vector moves a layer on real inputs.

An SVD of the task vector ``Δ`` asks what the weights can do; ESD asks what they do to the data: the right singular vectors of
the activation shift ``Y = X Δᵀ``. They follow from ``d x d`` Gram matrices, which are summed over batches without error.
Source: Essential Subspace Merging (ESM), activation-shift PCA; uncentred, as in the authors' code.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_vision.functional.linalg import GRAM_TOLERANCE, top_svd


class EssentialSubspace(NamedTuple):
    """Leading principal directions of an activation shift, largest first.

    Attributes:
        directions: orthonormal columns, ``[d_out, k]``, in the dtype of the task vector.
        eigenvalues: mean squared shift along each direction, ``[k]``, float64.
        total: mean squared shift along all directions; ``eigenvalues.sum() / total`` is the share that is explained.
    """

    directions: Tensor
    eigenvalues: Tensor
    total: float


class RowGram:
    """Running Gram matrix ``Σ xᵀx`` of rows that arrive batch by batch, in float64.

    The sum does not depend on how the rows are batched (to about 1e-12). An instance is an observer: call it with a batch.

    Attributes:
        matrix: ``[d, d]``, float64; ``None`` before the first batch.
        rows: number of rows seen.
    """

    def __init__(self) -> None:
        self.matrix: Tensor | None = None
        self.rows = 0

    def __call__(self, x: Tensor) -> None:
        """Add a batch, ``[..., d]``."""
        rows = x.detach().flatten(0, -2).double()
        self.rows += len(rows)
        if self.matrix is None:
            self.matrix = rows.T @ rows
        else:
            self.matrix.addmm_(rows.T, rows)


class ShiftStatistic:
    """What ESD has to know about a layer's inputs, gathered batch by batch; an observer.

    A layer with ``d_out <= d_in`` accumulates the Gram matrix of its output shifts, ``[d_out, d_out]``; another one that of its
    inputs, ``[d_in, d_in]``: whichever is smaller.

    Args:
        delta: task vector of the layer's weight, ``[d_out, d_in]``.
    """

    def __init__(self, delta: Tensor) -> None:
        self.delta = delta
        self.gram = RowGram()
        self._of_inputs = delta.shape[0] > delta.shape[1]

    def __call__(self, x: Tensor) -> None:
        """Add a batch of the layer's inputs, ``[..., d_in]``."""
        self.gram(x if self._of_inputs else x.detach().double() @ self.delta.double().T)

    def subspace(self, k: int) -> EssentialSubspace:
        """The ``k`` leading directions of the shift; as :func:`essential_subspace`, and empty for an all-zero task vector."""
        if not self.delta.any():
            return _empty(self.delta)
        if self.gram.matrix is None:
            raise ValueError("no layer inputs were observed")
        if self._of_inputs:
            return essential_subspace(self.delta, self.gram.matrix, self.gram.rows, k)
        return _principal(self.gram.matrix, self.gram.rows, k, self.delta.dtype)


def essential_subspace(delta: Tensor, gram: Tensor, rows: int, k: int, tol: float = GRAM_TOLERANCE) -> EssentialSubspace:
    """Essential subspace of a task vector, from the Gram matrix of the layer's inputs.

    The same Gram matrix serves any number of task vectors of the layer: no second forward pass.

    Args:
        delta: ``[d_out, d_in]``, float32 or float64.
        gram: ``XᵀX`` over all input rows, ``[d_in, d_in]``, float64.
        rows: number of input rows, at least 2.
        k: how many directions.
        tol: directions whose root-mean-square shift is up to this share of the largest count as null.

    Returns:
        ``min(k, numerical rank of X Δᵀ)`` directions with the eigenvalues of ``Δ XᵀX Δᵀ / (rows - 1)``.

    Raises:
        ValueError: for fewer than 2 rows, or a Gram matrix that does not fit.

    >>> delta, x = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([[5.0, 1.0], [7.0, 2.0], [9.0, 2.0]]).double()
    >>> essential_subspace(delta, x.T @ x, rows=3, k=2).eigenvalues
    tensor([4.5000], dtype=torch.float64)
    """
    d_out, d_in = delta.shape
    if gram.shape != (d_in, d_in):
        raise ValueError(f"a Gram matrix of shape {tuple(gram.shape)} does not fit a task vector of shape {tuple(delta.shape)}")
    D = delta.double()
    if d_out <= d_in:
        return _principal(D @ gram.double() @ D.T, rows, k, delta.dtype, tol)
    _check_rows(rows)
    values, vectors = torch.linalg.eigh(gram.double())
    A = D @ (vectors * values.clamp(min=0).sqrt())  # A Aᵀ = Δ XᵀX Δᵀ
    U, s, _ = top_svd(A, min(k, rows), tol)
    return EssentialSubspace(U.to(delta.dtype), s.square() / (rows - 1), float(A.square().sum()) / (rows - 1))


def _principal(gram: Tensor, rows: int, k: int, dtype: torch.dtype, tol: float = GRAM_TOLERANCE) -> EssentialSubspace:
    """Leading eigenpairs of a Gram matrix of output shifts, ``[d_out, d_out]``."""
    _check_rows(rows)
    values, vectors = torch.linalg.eigh(gram)
    top = values.flip(0)[: min(k, rows)]
    top = top[top > tol**2 * values[-1].clamp(min=0)]
    directions = vectors.flip(1)[:, : len(top)].to(dtype)
    return EssentialSubspace(directions, top / (rows - 1), float(gram.trace()) / (rows - 1))


def _empty(delta: Tensor) -> EssentialSubspace:
    return EssentialSubspace(delta.new_zeros(len(delta), 0), delta.new_zeros(0, dtype=torch.float64), 0.0)


def _check_rows(rows: int) -> None:
    if rows < 2:
        raise ValueError(f"an essential subspace needs at least 2 input rows, not {rows}")
