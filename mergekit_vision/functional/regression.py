"""Merging one Linear layer by least squares: the weights whose outputs on all tasks' inputs are nearest to the experts' own.

With ``G_t`` the Gram matrix of task ``t``'s inputs, ``Σ_t ‖X_t Uᵀ - X_t Δ_tᵀ‖²`` is least where ``(Σ G_t) Uᵀ = Σ G_t Δ_tᵀ``.
Everything is about the task vectors ``Δ_t``, so that what no expert changed stays exactly as it was.
Sources: RegMean (ICLR 2023), RegMean++ (2025), LOT Merging (NeurIPS 2025), WUDI-Merging (ICML 2025).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_vision.functional.eigen import eigh
from mergekit_vision.functional.esd import RowGram
from mergekit_vision.functional.gram import gram

NULL = 1e-12
"""Eigenvalues up to this share of the largest are round-off in the Gram matrix of float32 inputs: the square of 1e-6."""


class Normal(NamedTuple):
    """Normal equations ``matrix @ Uᵀ = target`` of one layer, which add up over tasks.

    Attributes:
        matrix: ``[d_in, d_in]``, float64.
        target: ``[d_in, d_out]``, float64.
    """

    matrix: Tensor
    target: Tensor


def shrunk(G: Tensor, keep: float) -> Tensor:
    """A Gram matrix with its off-diagonal entries multiplied by ``keep``.

    >>> shrunk(torch.tensor([[4.0, 2.0], [2.0, 9.0]]), 0.5)
    tensor([[4., 1.],
            [1., 9.]])
    """
    shrunk = G * keep
    shrunk.diagonal().copy_(G.diagonal())
    return shrunk


def of_inputs(inputs: RowGram, delta: Tensor, keep: float = 1.0) -> Normal:
    """A task's part in RegMean's normal equations.

    Args:
        inputs: Gram matrix of all rows of the layer's inputs.
        delta: task vector, ``[d_out, d_in]``.
        keep: as in :func:`shrunk`.
    """
    if inputs.matrix is None:
        raise ValueError("no layer inputs were observed")
    return _normal(inputs.matrix / inputs.rows, delta, keep)


def of_delta(delta: Tensor, keep: float = 1.0) -> Normal | None:
    """The same without inputs: a task vector ``[d_out, d_in]`` stands for them, ``G = Δᵀ Δ / ‖Δ‖²``; ``None`` if it is zero."""
    D = delta.double()
    energy = float(D.square().sum())
    return _normal(gram(D) / energy, D, keep) if energy else None


def _normal(G: Tensor, delta: Tensor, keep: float) -> Normal:
    matrix = shrunk(G, keep)
    return Normal(matrix, matrix @ delta.double().T)


def solved(normal: Normal, ridge: float = 0.0) -> Tensor:
    """The least squares solution ``U [d_out, d_in]``, float64; of many, the one of least norm.

    Args:
        normal: the normal equations, summed over tasks.
        ridge: multiple of the matrix's mean diagonal entry that is added to its diagonal.

    >>> normal = Normal(torch.diag(torch.tensor([4.0, 0.0])).double(), torch.tensor([[8.0], [0.0]]).double())
    >>> solved(normal)
    tensor([[2., 0.]], dtype=torch.float64)
    """
    G, target = normal
    if ridge:
        G = G.clone()
        G.diagonal().add_(G.diagonal().mean() * ridge)
    return semidefinite_solve(G, target).T


def semidefinite_solve(G: Tensor, target: Tensor) -> Tensor:
    """``G⁺ @ target`` of a positive semi-definite ``G``, float64: by Cholesky unless an eigenvalue is as good as zero."""
    scale = G.diagonal().clamp(min=torch.finfo(G.dtype).tiny).rsqrt()  # a unit diagonal, whatever the inputs' units
    root, failed = torch.linalg.cholesky_ex((scale[:, None] * G).mul_(scale))
    if not failed and float(root.diagonal().min()) ** 2 > NULL:
        solution: Tensor = torch.cholesky_solve(scale[:, None] * target, root).mul_(scale[:, None])
        return solution
    values, vectors = eigh(G)
    kept = values > NULL * values[-1].clamp(min=0)
    least: Tensor = vectors[:, kept] @ ((vectors[:, kept].T @ target) / values[kept, None])
    return least
