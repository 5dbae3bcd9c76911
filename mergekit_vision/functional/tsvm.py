"""TSV-M: task singular vectors, orthogonalized against each other.

Source: Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging" (CVPR 2025), TSV-Merge.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_vision.functional.linalg import TopSVD, polar_product, top_svd
from mergekit_vision.functional.threads import in_threads


def tsvm_merge(deltas: Tensor, rank: int | None = None) -> Tensor:
    """Merge the task vectors of one weight matrix by TSV-M.

    Every task keeps its ``rank`` leading singular triplets ``U_t, S_t, V_t``, capped at the numerical rank; with ``U`` and ``V``
    the tasks' vectors side by side, the merged task vector is ``polar(U) @ diag(S) @ polar(V)ᵀ``.

    Args:
        deltas: ``[T, d_out, d_in]``, float32 or float64.
        rank: triplets a task; ``min(d_out, d_in) // T`` where ``None`` (0 for more tasks than that: nothing is kept).

    Returns:
        ``[d_out, d_in]``, in the dtype of ``deltas``.

    >>> tsvm_merge(torch.diag_embed(torch.tensor([[4.0, 0.5], [0.1, 2.0]])))
    tensor([[4., 0.],
            [0., 2.]])
    """
    k = min(deltas.shape[1:]) // len(deltas) if rank is None else rank
    return tsvm_merge_of(in_threads(lambda delta: top_svd(delta.double(), k), list(deltas))).to(deltas.dtype)


def tsvm_merge_of(tops: Sequence[TopSVD]) -> Tensor:
    """:func:`tsvm_merge` by the leading singular triplets of each task, in their dtype."""
    U, S, Vh = torch.cat([top.U for top in tops], 1), torch.cat([top.S for top in tops]), torch.cat([top.Vh for top in tops])
    return polar_product(U, Vh, diagonal=S).product
