"""Ridge regression of limited rank: the low-rank matrix that does on given inputs most nearly what is wanted."""

from torch import Tensor

from mergekit_vision.functional.esd import essential_subspace
from mergekit_vision.functional.regression import semidefinite_solve


def low_rank_fit(inputs: Tensor, cross: Tensor, anchor: Tensor, rank: int, ridge: float) -> tuple[Tensor, Tensor]:
    """The matrix ``R`` of limited rank with the least ``Σ ‖t - R x‖² + λ ‖R - anchor‖²`` over inputs ``x`` and targets ``t``.

    ``λ`` is ``ridge`` times the mean of the sums of squares of the inputs' dimensions. Without the limit the minimum is
    ``R* = (TᵀX + λ anchor) H⁻¹`` with ``H = XᵀX + λ I``; another ``R`` is worse by ``‖(R - R*) H^½‖²``, so that the best is
    ``R*`` projected onto the leading left singular vectors of ``R* H^½`` (Eckart and Young). Nothing but the products of
    inputs ``X [n, d_in]`` and targets ``T [n, d_out]`` is needed, and these add up over parts of the rows.

    Args:
        inputs: ``XᵀX``, ``[d_in, d_in]``, float64.
        cross: ``XᵀT``, ``[d_in, d_out]``, float64.
        anchor: ``[d_out, d_in]``.
        rank: limit of the rank.
        ridge: above 0.

    Returns:
        ``up [d_out, r]``, with orthonormal columns, and ``down [r, d_in]``, float32; their product is ``R``.

    >>> import torch
    >>> target = torch.diag(torch.tensor([3.0, 2.0, 1.0])).double()
    >>> up, down = low_rank_fit(torch.eye(3).double(), target, torch.zeros(3, 3), rank=2, ridge=1.0)
    >>> (up @ down).diagonal()
    tensor([1.5000, 1.0000, 0.0000])
    """
    pull = ridge * inputs.diagonal().mean()
    H = inputs.clone()
    H.diagonal().add_(pull)
    R = semidefinite_solve(H, cross + pull * anchor.double().T).T
    # the pull is as good as a row for each dimension, so that rows never limit the rank
    up = essential_subspace(R, H, len(H) + 1, rank).directions
    return up.float(), (up.T @ R).float()
