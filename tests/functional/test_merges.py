"""Properties of the spectral merges that hold whatever the numbers."""

import torch
from tolerances import direct, from_gram

from mergekit_vision.functional.esd import EssentialSubspace
from mergekit_vision.functional.esm import eigenvalue_weights, esm_merge, inter_layer_factors
from mergekit_vision.functional.tsvm import tsvm_merge


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def test_tsvm_of_orthogonal_subspaces_is_the_sum_of_the_truncations() -> None:
    U, V = orthonormal(36, 24, 0), orthonormal(24, 24, 1)
    S = torch.logspace(0, -2, 6, dtype=torch.float64)
    parts = [slice(6 * t, 6 * t + 6) for t in range(4)]
    deltas = torch.stack([U[:, part] @ torch.diag(S * (t + 1)) @ V[:, part].T for t, part in enumerate(parts)])
    assert (tsvm_merge(deltas) - deltas.sum(0)).norm() < from_gram(1e2) * deltas.norm()
    truncated = sum(U[:, part][:, :2] @ torch.diag(S[:2] * (t + 1)) @ V[:, part][:, :2].T for t, part in enumerate(parts))
    assert (tsvm_merge(deltas, rank=2) - truncated).norm() < from_gram(1e2) * deltas.norm()


def test_tsvm_of_one_task_is_that_task() -> None:
    delta = torch.randn(1, 10, 7, generator=torch.Generator().manual_seed(0))
    assert (tsvm_merge(delta) - delta[0]).norm() < direct(10, 1.0) * delta.norm(), "of orthonormal singular vectors"


def test_tsvm_of_more_tasks_than_ranks_keeps_nothing() -> None:
    assert not tsvm_merge(torch.ones(5, 4, 3)).any()


def subspaces(tasks: int, k: int) -> list[EssentialSubspace]:
    return [EssentialSubspace(orthonormal(24, k, t), torch.logspace(0, -3, k, dtype=torch.float64), 2.0) for t in range(tasks)]


def condition(deltas: torch.Tensor, spaces: list[EssentialSubspace]) -> float:
    """Largest condition number of the two matrices whose polar factors ESM takes."""
    weighted = [
        (space.directions * eigenvalue_weights(space.eigenvalues, 0.15), delta)
        for space, delta in zip(spaces, deltas, strict=True)
    ]
    E, C = torch.cat([E for E, _ in weighted], 1), torch.cat([E.T @ delta for E, delta in weighted])
    return max(float(torch.linalg.cond(matrix)) for matrix in (E, C))


def test_esm_does_not_depend_on_the_signs_of_the_directions() -> None:
    deltas = torch.randn(4, 24, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flips = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    spaces = subspaces(4, 6)
    flipped = [space._replace(directions=space.directions * flips.roll(t)) for t, space in enumerate(spaces)]
    expected = esm_merge(deltas, spaces)
    assert (esm_merge(deltas, flipped) - expected).norm() < from_gram(condition(deltas, spaces)) * expected.norm()


def test_esm_skips_a_task_without_directions() -> None:
    deltas = torch.randn(3, 24, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    deltas[1] = 0
    empty = EssentialSubspace(torch.zeros(24, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64), 0.0)
    a, _, b = subspaces(3, 6)
    expected = esm_merge(deltas[[0, 2]], [a, b], inter_task=0)
    bound = from_gram(condition(deltas[[0, 2]], [a, b])) * expected.norm()
    assert (esm_merge(deltas, [a, empty, b], inter_task=0) - expected).norm() < bound
    assert not esm_merge(deltas, [empty] * 3).any()


def test_exponents_of_zero_switch_the_scalings_off() -> None:
    values = torch.tensor([4.0, 1.0, 0.5])
    assert eigenvalue_weights(values, 0.0).tolist() == [1, 1, 1]
    assert inter_layer_factors(values, 0.0).tolist() == [1, 1, 1]
    assert inter_layer_factors(torch.zeros(3), 2.0).isfinite().all()
