"""WUDI's objective, descended for a finite time in closed form."""

from collections.abc import Iterable

import torch
from torch import Tensor

from mergekit_vision.functional.eigen import eigh
from mergekit_vision.functional.gram import gram


def swudi_merge(deltas: Iterable[Tensor], time: float, share: float = 1.0) -> Tensor:
    """Merge the task vectors of one weight matrix by gradient flow on ``Σ_t ‖(M - Δ_t) Δ_tᵀ‖² / ‖Δ_t‖²``.

    With ``S = Σ_t Δ_tᵀ Δ_t / ‖Δ_t‖² = Q diag(λ) Qᵀ`` and ``B = Σ_t Δ_t Δ_tᵀ Δ_t / ‖Δ_t‖²`` the gradient is ``2 (M S - B)``, and
    from ``M_0 = Σ_t Δ_t`` the flow has come after ``time`` to ``M_0 + (B - M_0 S) Q diag((1 - exp(-time λ)) / λ) Qᵀ``: directions
    in which the tasks write much have settled, the others are left where they were.

    Args:
        deltas: the task vectors, ``[d_out, d_in]``, one after the other; zero ones have no part.
        time: in units of one over the mean eigenvalue of ``S``.
        share: of the directions, those of the largest eigenvalues, that move; in [0, 1].

    Returns:
        ``[d_out, d_in]``, float64.

    >>> swudi_merge([torch.tensor([[2.0, 0.0]]), torch.tensor([[4.0, 0.0]])], time=1e9)  # a mean by ‖Δ‖², where the sum is 6
    tensor([[3., 0.]], dtype=torch.float64)
    """
    start = None
    second: Tensor | float = 0.0
    third: Tensor | float = 0.0
    for delta in deltas:
        D = delta.double()
        start = D.clone() if start is None else start.add_(D)
        if energy := float(D.square().sum()):
            G = gram(D).div_(energy)
            second, third = second + G, third + D @ G
    if start is None:
        raise ValueError("no task vectors")
    if not (isinstance(second, Tensor) and isinstance(third, Tensor)):
        return start
    values, Q = eigh(second)
    still = len(values) - round(share * len(values))  # the smallest come first
    x, Q = (time / values.mean() * values[still:]).clamp(min=torch.finfo(values.dtype).tiny), Q[:, still:]
    gains = -torch.expm1(-x) / x * (time / values.mean())
    merged: Tensor = start + ((third - start @ second) @ Q * gains) @ Q.T
    return merged
