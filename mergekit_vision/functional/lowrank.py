"""Ridge regression of limited rank: the low-rank matrix that does on given inputs most nearly what is wanted."""

import torch
from torch import Tensor

from mergekit_vision.functional.esd import essential_subspace
from mergekit_vision.functional.gram import gram
from mergekit_vision.functional.regression import semidefinite_solve


def low_rank_fit(x: Tensor, target: Tensor, anchor: Tensor, rank: int, ridge: float) -> tuple[Tensor, Tensor]:
    """The matrix ``R`` of limited rank with the least ``Σ ‖target - R x‖² + λ ‖R - anchor‖²``.

    ``λ`` is ``ridge`` times the mean of the sums of squares of the inputs' dimensions. Without the limit the minimum is
    ``R* = (TᵀX + λ anchor) H⁻¹`` with ``H = XᵀX + λ I``; another ``R`` is worse by ``‖(R - R*) H^½‖²``, so that the best is
    ``R*`` projected onto the leading left singular vectors of ``R* H^½`` (Eckart and Young).

    Args:
        x: inputs, ``[n, d_in]``, float64.
        target: wanted outputs, ``[n, d_out]``, float64.
        anchor: ``[d_out, d_in]``.
        rank: limit of the rank.
        ridge: above 0.

    Returns:
        ``up [d_out, r]``, with orthonormal columns, and ``down [r, d_in]``, float32; their product is ``R``.

    >>> x = torch.eye(3).double()
    >>> up, down = low_rank_fit(x, torch.diag(torch.tensor([3.0, 2.0, 1.0])).double(), torch.zeros(3, 3), rank=2, ridge=1.0)
    >>> (up @ down).diagonal()
    tensor([1.5000, 1.0000, 0.0000])
    """
    G = gram(x)
    pull = ridge * G.diagonal().mean()
    H = G + pull * torch.eye(len(G), dtype=G.dtype, device=G.device)
    R = semidefinite_solve(H, x.T @ target + pull * anchor.double().T).T
    up = essential_subspace(R, H, len(x) + len(H), rank).directions  # the pull is as good as a row for each dimension
    return up.float(), (up.T @ R).float()
