"""Gram matrices."""

import torch
from torch import Tensor

GRAM_BLOCK = 128
"""Columns of a Gram matrix that are computed at once: enough to keep a product at full speed."""


def gram(A: Tensor, onto: Tensor | None = None) -> Tensor:
    """``Aᵀ A`` of ``A [n, d]`` in its own dtype, computing little more than one triangle.

    Args:
        A: the matrix.
        onto: another Gram matrix ``[d, d]``, to which this one is added in place.

    >>> gram(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    tensor([[1., 2.],
            [2., 5.]])
    """
    if A.is_cuda:  # one large product is faster there
        return A.T @ A if onto is None else onto.addmm_(A.T, A)
    d = A.shape[1]
    G = A.new_empty(d, d) if onto is None else onto
    for start in range(0, d, GRAM_BLOCK):
        stop = min(start + GRAM_BLOCK, d)
        part, left, right = G[start:stop, start:], A[:, start:stop].T, A[:, start:]
        if onto is None:
            torch.mm(left, right, out=part)
        else:
            part.addmm_(left, right)
        G[stop:, start:stop] = part[:, stop - start :].T
    return G


def triangle(G: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix ``[d, d]``, row by row: ``[d (d + 1) / 2]``, half of what there is to store."""
    row, column = torch.triu_indices(len(G), len(G), device=G.device)
    return G[row, column]


def symmetric(triangle: Tensor, side: int) -> Tensor:
    """The matrix that :func:`triangle` was taken of.

    >>> symmetric(triangle(torch.tensor([[1.0, 2.0], [2.0, 5.0]])), 2)
    tensor([[1., 2.],
            [2., 5.]])
    """
    row, column = torch.triu_indices(side, side, device=triangle.device)
    G = triangle.new_empty(side, side)
    G[row, column] = triangle
    G[column, row] = triangle
    return G
