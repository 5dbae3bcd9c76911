"""OPCM: the part of a task vector that a sum of others does not use yet.

Source: Tang et al., "Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model Merging"
(2025), in the form of the authors' code.
"""

from torch import Tensor

from mergekit_vision.functional.linalg import top_svd


def unused_part(delta: Tensor, total: Tensor, split: float = 0.5) -> Tensor:
    """A task vector of one matrix without what the task vectors summed before it use.

    With the SVD ``U diag(σ) Vᵀ`` of the sum, the coordinates ``Uᵀ Δ V`` lose their diagonal, and the block of the leading
    directions. Outside of the sum's row and column space everything stays.

    Args:
        delta: task vector, ``[m, n]``, float32 or float64.
        total: the sum so far, ``[m, n]``, at any scale, same dtype.
        split: share of ``Σσ`` that the leading directions hold together at most, in [0, 1].

    >>> import torch
    >>> unused_part(torch.ones(3, 2), torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]]))
    tensor([[0., 1.],
            [1., 0.],
            [1., 1.]])
    """
    U, S, Vh = top_svd(total, min(total.shape))
    if not len(S):
        return delta
    rows, energy = U.T @ delta, S.cumsum(0)
    closed = int((energy <= split * energy[-1]).sum())
    used = (rows * Vh).sum(1).diag()
    used[:closed, :closed] = rows[:closed] @ Vh[:closed].T
    return delta - U @ used @ Vh
