"""DC-Merge: task vectors merged by election in coordinates in which the tasks' leading directions are orthogonal.

Source: Zhang et al., "DC-Merge: Improving Model Merging with Directional Consistency" (CVPR 2026), in the form of the authors'
code.
"""

import torch
from torch import Tensor

from mergekit_vision.functional.linalg import polar, top_svd
from mergekit_vision.functional.threads import in_threads


def smoothed(S: Tensor, ratio: float) -> Tensor:
    """Singular values ``[k]``, largest first, replaced by evenly spaced ones with their sum.

    Args:
        S: singular values.
        ratio: of the largest to the smallest afterwards, unless it was smaller before; 1 makes all equal.

    >>> smoothed(torch.tensor([9.0, 2.0, 1.0]), ratio=3.0)
    tensor([6., 4., 2.])
    """
    if not len(S):
        return S
    shape = torch.linspace(min(ratio, float(S[0] / S[-1])), 1.0, len(S), dtype=S.dtype, device=S.device)
    return shape * (S.sum() / shape.sum())


def dc_merge(deltas: Tensor, rank: int | None = None, density: float = 1e-3, smoothing: float | None = None) -> Tensor:
    """Merge the task vectors of one weight matrix by DC-Merge.

    Every task keeps its leading singular triplets. With ``A`` and ``B`` the polar factors of all tasks' left and right singular
    vectors, side by side, its coordinates are ``M_t = Aᵀ U_t diag(S_t) V_tᵀ B``. Each ``M_t`` is trimmed to its largest entries,
    the entries that have the sign of their sum are averaged, and only the diagonal blocks, one a task, are taken back:
    ``A M Bᵀ``.

    Args:
        deltas: ``[T, d_out, d_in]``, float32 or float64.
        rank: triplets a task, at most the numerical rank; ``min(d_out, d_in) // T`` where ``None``.
        density: share of the coordinates that a task keeps. They count as ``[r, r]`` with ``r = min(d_out, d_in)``, or
            ``r = T * rank`` for a given rank; one is always kept.
        smoothing: ratio to which each task's singular values are smoothed; not at all where ``None``.

    Returns:
        ``[d_out, d_in]``, in the dtype of ``deltas``; zero for more tasks than directions.

    >>> dc_merge(torch.diag_embed(torch.tensor([[4.0, 0.5], [0.1, 2.0]])), density=1.0)
    tensor([[4., 0.],
            [0., 2.]])
    """
    side, tasks = min(deltas.shape[1:]), len(deltas)
    tops = in_threads(lambda delta: top_svd(delta.double(), side // tasks if rank is None else rank), list(deltas))
    U, Vh = torch.cat([top.U for top in tops], 1), torch.cat([top.Vh for top in tops])
    if not len(Vh):
        return torch.zeros_like(deltas[0])
    A, B = in_threads(lambda M: polar(M).factor, (U, Vh))  # B is transposed already, as V is
    kept = max(1, int(density * (side if rank is None else min(side, tasks * rank)) ** 2))
    owner = torch.cat([torch.full((len(top.S),), task, device=U.device) for task, top in enumerate(tops)])
    blocks = owner[:, None] == owner  # the only coordinates that are taken back

    def coordinates(task: int) -> Tensor:
        top = tops[task]
        S = top.S if smoothing is None else smoothed(top.S, smoothing)
        M = (A.T @ top.U * S) @ (top.Vh @ B.T)
        sizes = M.abs()
        threshold = sizes.flatten().topk(min(kept, M.numel())).values[-1]
        return M.mul_(sizes >= threshold)[blocks]

    trimmed = torch.stack(in_threads(coordinates, range(tasks)))
    sign = trimmed.sum(0).sign()
    agree = (trimmed.sign() == sign) & (sign != 0)
    M = torch.zeros_like(blocks, dtype=U.dtype)
    M[blocks] = (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)
    return (A @ M @ B).to(deltas.dtype)
