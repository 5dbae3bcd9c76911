"""Essential Subspace Decomposition: the output directions in which a task vector moves a layer on real inputs.

An SVD of the task vector ``Δ`` asks what the weights can do; ESD asks what they do to the data: the right singular vectors of
the activation shift ``Y = X Δᵀ``. They follow from ``d x d`` Gram matrices, which are summed over batches without error.
Source: Essential Subspace Merging (ESM), activation-shift PCA; uncentered, as in the authors' code.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_vision.functional.eigen import eigh
from mergekit_vision.functional.gram import gram
from mergekit_vision.functional.leading import leading_eigenpairs
from mergekit_vision.functional.linalg import GRAM_TOLERANCE

FLOAT32_TOLERANCE = 1e-6
"""Shifts below this share of the largest are round-off when a float32 task vector was multiplied in float32."""


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


class CompactSubspace(NamedTuple):
    """An essential subspace without its task vector, in the smaller of two forms.

    Attributes:
        basis: the directions, ``[d_out, k]``; or, of a layer with ``d_out > d_in``, the inputs that the task vector maps to them,
            ``[d_in, k]``. In the dtype of the task vector.
        eigenvalues: see :class:`EssentialSubspace`.
        total: see :class:`EssentialSubspace`.
    """

    basis: Tensor
    eigenvalues: Tensor
    total: float

    def leading(self, k: int) -> "CompactSubspace":
        """The subspace of its ``k`` leading directions, or of all where there are fewer."""
        return CompactSubspace(self.basis[:, :k], self.eigenvalues[:k], self.total)

    def of(self, delta: Tensor) -> EssentialSubspace:
        """The subspace itself, given the task vector ``[d_out, d_in]`` that it was found for."""
        directions = delta @ self.basis if _wider_out(delta.shape) else self.basis
        return EssentialSubspace(directions, self.eigenvalues, self.total)


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
        self.matrix = gram(rows, self.matrix)


class ShiftStatistic:
    """What ESD has to know about a layer's inputs, gathered batch by batch; an observer.

    A layer with ``d_out <= d_in`` accumulates the Gram matrix of its output shifts, ``[d_out, d_out]``; another one that of its
    inputs, ``[d_in, d_in]``: whichever is smaller.

    Args:
        delta: task vector of the layer's weight, ``[d_out, d_in]``; or a function that gives it anew whenever it is needed, so
            that the statistics of many layers do not hold many task vectors.
        shape: of the task vector; where it is known, a wider layer's function is not called until all inputs are seen.
    """

    def __init__(self, delta: Tensor | Callable[[], Tensor], shape: Sequence[int] | None = None) -> None:
        self._delta = delta
        self._of_inputs = None if shape is None else _wider_out(shape)
        self._shift_dtype: torch.dtype | None = None
        """Of the task vector, once shifts are accumulated; then nothing else of it is needed."""
        self.gram = RowGram()

    @property
    def delta(self) -> Tensor:
        """The task vector."""
        return self._delta if isinstance(self._delta, Tensor) else self._delta()

    def __call__(self, x: Tensor) -> None:
        """Add a batch of the layer's inputs, ``[..., d_in]``."""
        if self._of_inputs is None:
            self._of_inputs = _wider_out(self.delta.shape)
        if self._of_inputs:
            self.gram(x)
        else:  # float32 will do for the shift itself, as it would for an SVD of it; only a Gram squares the condition number
            delta = self.delta
            self._shift_dtype = delta.dtype
            self.gram(x.detach().to(delta.dtype) @ delta.T)

    def subspace(self, k: int) -> EssentialSubspace:
        """The ``k`` leading directions of the shift; as :func:`essential_subspace`, and empty for an all-zero task vector."""
        return self.compact(k).of(self.delta)

    def compact(self, k: int) -> CompactSubspace:
        """The same without the task vector."""
        if self._shift_dtype is None:
            delta = self.delta
            if not delta.any():
                return _nothing(min(delta.shape), delta)
            return _through_inputs(delta, self._checked(), self.gram.rows, k, _tolerance(delta.dtype))
        shifts, dtype = self._checked(), self._shift_dtype
        if not shifts.any():
            return _nothing(len(shifts), shifts.new_zeros(0, dtype=dtype))
        return _principal(shifts, self.gram.rows, k, dtype, _tolerance(dtype))

    def _checked(self) -> Tensor:
        if self.gram.matrix is None:
            raise ValueError("no layer inputs were observed")
        if not self.gram.matrix.diagonal().isfinite().all():
            raise ValueError("its inputs, or their products with the task vector, hold NaN or infinity")
        return self.gram.matrix


def essential_subspace(delta: Tensor, inputs: Tensor, rows: int, k: int, tol: float | None = None) -> EssentialSubspace:
    """Essential subspace of a task vector, from the Gram matrix of the layer's inputs.

    The same Gram matrix serves any number of task vectors of the layer: no second forward pass.

    Args:
        delta: ``[d_out, d_in]``, float32 or float64.
        inputs: ``XᵀX`` over all input rows, ``[d_in, d_in]``, float64.
        rows: number of input rows, at least 2.
        k: how many directions.
        tol: directions whose root-mean-square shift is up to this share of the largest count as null; 1e-6 for a float32 task
            vector and 1e-7 for a float64 one where ``None``.

    Returns:
        ``min(k, numerical rank of X Δᵀ)`` directions with the eigenvalues of ``Δ XᵀX Δᵀ / (rows - 1)``. Where ``k`` is at most a
        sixth of a side of 512 and more, they span the space of the leading ones up to an angle of 1e-6.

    Raises:
        ValueError: for fewer than 2 rows, or a Gram matrix that does not fit.

    >>> delta, x = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([[5.0, 1.0], [7.0, 2.0], [9.0, 2.0]]).double()
    >>> essential_subspace(delta, x.T @ x, rows=3, k=2).eigenvalues
    tensor([4.5000], dtype=torch.float64)
    """
    d_in = delta.shape[1]
    if inputs.shape != (d_in, d_in):
        raise ValueError(f"a Gram matrix of shape {tuple(inputs.shape)} does not fit a task vector of shape {tuple(delta.shape)}")
    tol = _tolerance(delta.dtype) if tol is None else tol
    if _wider_out(delta.shape):
        return _through_inputs(delta, inputs.double(), rows, k, tol).of(delta)
    D = delta.double()
    return _principal(D @ inputs.double() @ D.T, rows, k, delta.dtype, tol).of(delta)


def _nothing(side: int, like: Tensor) -> CompactSubspace:
    return CompactSubspace(like.new_zeros(side, 0), like.new_zeros(0).double(), 0.0)


def _through_inputs(delta: Tensor, inputs: Tensor, rows: int, k: int, tol: float) -> CompactSubspace:
    """From the Gram matrix of the layer's inputs ``R Rᵀ``: left singular vectors of ``A = Δ R``, as ``Δ (R ω / σ)``."""
    _check_rows(rows)
    R = _root(inputs)
    A = (delta @ R.to(delta.dtype)).double()
    shifts = gram(A)
    values, vectors = _leading(shifts, min(k, rows), tol)
    basis = (R @ (vectors / values.sqrt())).to(delta.dtype)
    return CompactSubspace(basis, values / (rows - 1), float(shifts.trace()) / (rows - 1))


def _principal(shifts: Tensor, rows: int, k: int, dtype: torch.dtype, tol: float) -> CompactSubspace:
    """Leading eigenpairs of a Gram matrix of output shifts, ``[d_out, d_out]``."""
    _check_rows(rows)
    values, vectors = _leading(shifts, min(k, rows), tol)
    return CompactSubspace(vectors.to(dtype), values / (rows - 1), float(shifts.trace()) / (rows - 1))


def _leading(shifts: Tensor, k: int, tol: float) -> tuple[Tensor, Tensor]:
    """The ``k`` largest eigenpairs, largest first, without null directions."""
    values, vectors = leading_eigenpairs(shifts, k)
    values = values[values > tol**2 * values[:1].clamp(min=0)]
    return values, vectors[:, : len(values)]


def _root(G: Tensor) -> Tensor:
    """Some ``R`` with ``R Rᵀ = G`` for a positive semi-definite ``G``."""
    R: Tensor
    R, failed = torch.linalg.cholesky_ex(G)
    if failed:
        values, vectors = eigh(G)
        R = vectors * values.clamp(min=0).sqrt()
    return R


def _wider_out(shape: Sequence[int]) -> bool:
    return shape[0] > shape[1]


def _tolerance(dtype: torch.dtype) -> float:
    return FLOAT32_TOLERANCE if dtype == torch.float32 else GRAM_TOLERANCE


def _check_rows(rows: int) -> None:
    if rows < 2:
        raise ValueError(f"an essential subspace needs at least 2 input rows, not {rows}")
