"""The published formulas, written plainly in float64 with full SVDs; nothing of the package is used."""

import torch
from torch import Tensor


def polar_svd(M: Tensor) -> tuple[Tensor, float]:
    """``U Vᵀ`` and the mean of the thin singular values."""
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return U @ Vh, float(S.mean())


def ties(vectors: Tensor, percent: int, aggregate: str) -> Tensor:
    """Trim, elect, merge on whole task vectors, ``[T, P]``."""
    T, P = vectors.shape
    trimmed = torch.zeros_like(vectors)
    for t in range(T):
        m = P - (P * percent) // 100
        threshold = vectors[t].abs().sort().values[m - 1] if m > 0 else 0.0
        keep = vectors[t].abs() >= threshold
        trimmed[t, keep] = vectors[t, keep]
    sign = torch.sign(trimmed.sum(0))
    sign[sign == 0] = torch.sign(sign.sum())
    agreeing = torch.where(torch.sign(trimmed) == sign, trimmed, torch.zeros_like(trimmed))
    if aggregate == "max":
        return agreeing.gather(0, agreeing.abs().argmax(0, keepdim=True))[0]
    total = agreeing.sum(0)
    return total / (agreeing != 0).sum(0).clamp(min=1) if aggregate == "mean" else total


def one_by_one(energies: list[Tensor], budget: int, floor: int = 0, costs: list[int] | None = None) -> list[int]:
    """The next direction of most energy a unit of cost, again and again, until the budget does not allow it."""
    costs = costs or [1] * len(energies)
    ranks = [min(floor, len(energy)) for energy in energies]
    budget -= sum(k * cost for k, cost in zip(ranks, costs, strict=True))
    while True:
        best, gain = None, 0.0
        for owner, energy in enumerate(energies):
            if ranks[owner] < len(energy):
                share = float(energy[ranks[owner]]) / float(energy.sum()) / costs[owner]
                if share > gain:
                    best, gain = owner, share
        if best is None or costs[best] > budget:
            return ranks
        ranks[best] += 1
        budget -= costs[best]


def tsvm(deltas: Tensor, k: int | None = None, floor: int | None = None) -> Tensor:
    """The leading singular vectors of all tasks, side by side, made orthogonal; with a floor, shared out by energy."""
    T, o, i = deltas.shape
    k = min(o, i) // T if k is None else k
    svds = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    ks = [k] * T if floor is None else one_by_one([svd[1] ** 2 for svd in svds], T * k, floor)
    U = torch.cat([svd[0][:, :k] for svd, k in zip(svds, ks, strict=True)], 1)
    S = torch.cat([svd[1][:k] for svd, k in zip(svds, ks, strict=True)])
    V = torch.cat([svd[2][:k] for svd, k in zip(svds, ks, strict=True)])
    return polar_svd(U)[0] @ torch.diag(S) @ polar_svd(V)[0]


def esm(
    deltas: Tensor,
    rows: list[Tensor],
    *,
    power: float = 0.15,
    task: float = 2.0,
    dimension: float = 2.0,
    gain: float = 2.0,
    k: int | None = None,
    norm: str = "delta",
    floor: int | None = None,
) -> Tensor:
    """Steps 1 to 6 of ESM on one matrix: ``deltas`` is ``[T, o, i]``, ``rows[t]`` is ``[n, i]``; ``floor`` as for TSV-M."""
    T, o, _ = deltas.shape
    k = o // T if k is None else k
    svds = [torch.linalg.svd(X @ delta.T, full_matrices=False) for delta, X in zip(deltas, rows, strict=True)]
    # k may exceed the rank of the shift: null directions are left out
    energies = [S[S / S[0] > 1e-9] ** 2 for _, S, _ in svds]
    ks = [k] * T if floor is None else one_by_one(energies, T * k, floor)
    Es, Cs, norms = [], [], []
    for delta, X, (_, _, Vh), energy, k in zip(deltas, rows, svds, energies, ks, strict=True):
        eigenvalues = energy[:k] / (len(X) - 1)
        E = Vh[: len(eigenvalues)].T
        C = E.T @ delta
        norms.append((delta if norm == "delta" else C).norm())
        w = (eigenvalues / eigenvalues.mean()) ** power
        w = w / w.mean()
        Es.append(E @ torch.diag(w))
        Cs.append(torch.diag(w) @ C)
    mean = sum(norms) / T
    E, C = torch.cat(Es, 1), torch.cat([(nu / mean) ** task * C for nu, C in zip(norms, Cs, strict=True)])
    columns = C.norm(dim=0)
    C = C @ torch.diag((columns / columns.mean()) ** dimension)
    (polar_E, mean_E), (polar_C, mean_C) = polar_svd(E), polar_svd(C)
    return gain * mean_E * mean_C * polar_E @ polar_C


def inter_layer(layers: list[Tensor], power: float = 2.0) -> list[Tensor]:
    mean = sum(layer.norm() for layer in layers) / len(layers)
    return [(layer.norm() / mean) ** power * layer for layer in layers]


def matrix(m: int, n: int, cond: float, seed: int = 0, rank: int | None = None) -> Tensor:
    """Float64 matrix of a given condition number; of a given rank, if any."""
    generator = torch.Generator().manual_seed(seed)
    U, S, Vh = torch.linalg.svd(torch.randn(m, n, generator=generator, dtype=torch.float64), full_matrices=False)
    S = torch.logspace(0, -torch.log10(torch.tensor(cond)).item(), len(S), dtype=torch.float64)
    if rank is not None:
        S[rank:] = 0
    return U @ torch.diag(S) @ Vh


def exact_polar(M: Tensor, rank: int | None = None) -> Tensor:
    """``U Vᵀ`` of the ``rank`` leading singular directions."""
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    return U[:, :rank] @ Vh[:rank]
