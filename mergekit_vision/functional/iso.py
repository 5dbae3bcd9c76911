"""Isotropic merging: matrices whose directions all get the same weight.

Source: Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces" (ICML 2025), Iso-C
and Iso-CTS.
"""

import torch
from torch import Tensor

from mergekit_vision.functional.linalg import GRAM_TOLERANCE, TopSVD, polar, polar_product, top_svd
from mergekit_vision.functional.threads import in_threads


def flat_spectrum(M: Tensor, tol: float = GRAM_TOLERANCE, dtype: torch.dtype | None = None) -> Tensor:
    """The matrix with the singular vectors of ``M`` and the mean of its singular values for each of them (Iso-C).

    The mean is over all ``min(m, n)`` singular values, null ones included; null directions, whose vectors are arbitrary, stay
    zero.

    Args:
        M: ``[m, n]``, float32 or float64.
        tol: as for :func:`~mergekit_vision.functional.linalg.polar`.
        dtype: likewise.

    Returns:
        ``[m, n]``, in that dtype or, where it is ``None``, that of ``M``.

    >>> flat_spectrum(torch.tensor([[0.0, 1.0], [5.0, 0.0]]))
    tensor([[0., 3.],
            [3., 0.]])
    """
    found = polar(M, tol, dtype)
    return found.factor.mul_(found.nuclear_norm / min(M.shape))


def subspace_sizes(rank: int, tasks: int, common: float) -> tuple[int, int]:
    """How many directions of ``rank`` are common to all tasks, and how many belong to each task alone.

    The common ones are about the share ``common``, and as many as it takes to divide the rest among the tasks. Published code
    rounds the rest so; where many tasks share few directions that would take more than there are, and is capped here.

    >>> subspace_sizes(768, tasks=8, common=0.8)
    (616, 19)
    >>> subspace_sizes(7, tasks=2, common=0.0)
    (1, 3)
    """
    own = min(round((rank - int(common * rank)) / tasks), rank // tasks)
    return rank - own * tasks, own


def iso_cts_merge(deltas: Tensor, common: float = 0.8) -> Tensor:
    """Merge the task vectors of one weight matrix by Iso-CTS.

    The leading directions of the sum are the common subspace. Every task adds those directions in which its task vector, without
    what the common left directions span, is largest. All are made orthogonal and get the mean of all singular values.

    Args:
        deltas: ``[T, d_out, d_in]``, float32 or float64.
        common: share of the directions that are common, in [0, 1].

    Returns:
        ``[d_out, d_in]``, in the dtype of ``deltas``.

    >>> iso_cts_merge(torch.diag_embed(torch.tensor([[5.0, 0.0, 0.0], [1.0, 3.0, 0.0]])), common=0.4)
    tensor([[3., 0., 0.],
            [0., 3., 0.],
            [0., 0., 0.]])
    """
    rank = min(deltas.shape[1:])
    shared, own = subspace_sizes(rank, len(deltas), common)
    top = top_svd(deltas.sum(0, dtype=torch.float64), shared)
    wide = deltas.shape[1] <= deltas.shape[2]
    # in a wide matrix what the common directions leave over is small, and cheaper in coordinates of its own
    outside = torch.linalg.qr(top.U, mode="complete").Q[:, top.U.shape[1] :] if wide and own else None

    def of_task(delta: Tensor) -> TopSVD:
        matrix = delta.double()
        rest = matrix - top.U @ (top.U.T @ matrix) if outside is None else outside.T @ matrix
        U, S, Vh = top_svd(rest, own)
        # where the common subspace holds all of a task, round-off is left: small against the task vector, not against itself
        kept = GRAM_TOLERANCE * torch.linalg.vector_norm(matrix) < S
        return TopSVD(U[:, kept] if outside is None else outside @ U[:, kept], S[kept], Vh[kept])

    parts = [*(in_threads(of_task, list(deltas)) if own else []), top]
    merged = polar_product(torch.cat([part.U for part in parts], 1), torch.cat([part.Vh for part in parts])).product
    mean = sum(float(part.S.sum()) for part in parts) / rank
    return merged.mul_(mean).to(deltas.dtype)
