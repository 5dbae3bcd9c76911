"""Essential subspaces against the SVD of the shift that they stand for."""

import pytest
import torch
from tolerances import assert_near, direct, from_gram, subspace, summed
from torch import Tensor

from mergekit_vision.functional import leading
from mergekit_vision.functional.esd import RowGram, ShiftStatistic, essential_subspace

SHAPES = [(72, 24), (24, 24), (24, 96)]


def layer(o: int, i: int, n: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A float32 task vector with a decaying spectrum, and float32 input rows with a dominant mean."""
    generator = torch.Generator().manual_seed(seed)
    U, S, Vh = torch.linalg.svd(torch.randn(o, i, generator=generator), full_matrices=False)
    delta = U @ torch.diag(torch.logspace(0, -2, len(S))) @ Vh
    mixing = torch.randn(i, i, generator=generator) * torch.logspace(0, -1, i)
    return delta, torch.randn(n, i, generator=generator) @ mixing + 10 * torch.randn(i, generator=generator)


def by_svd(delta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Directions as columns, and eigenvalues: right singular vectors of the shift X Δᵀ, not centered."""
    _, S, Vh = torch.linalg.svd(x.double() @ delta.double().T, full_matrices=False)
    return Vh.T, S.square() / (len(x) - 1)


def scale_of(delta: Tensor, x: Tensor) -> float:
    """What round-off is relative to: the largest that the mean squared shift along any direction could be."""
    norms = [float(torch.linalg.matrix_norm(matrix.double(), 2)) for matrix in (delta, x)]
    return (norms[0] * norms[1]) ** 2 / (len(x) - 1)


def bounds(delta: Tensor, x: Tensor, k: int) -> tuple[float, float]:
    """Of the ``k`` leading eigenvalues, relative; and of the projector on their directions, whose norm is ``sqrt(k)``."""
    side, scale, eigenvalues = min(delta.shape), scale_of(delta, x), by_svd(delta, x)[1]
    last, following = float(eigenvalues[k - 1]), float(eigenvalues[k]) if k < min(len(eigenvalues), len(x)) else 0.0
    return side * from_gram((scale / last) ** 0.5), k**0.5 * subspace(side, scale, last - following)


def statistic_of(delta: Tensor, x: Tensor, batch: int) -> ShiftStatistic:
    statistic = ShiftStatistic(delta)
    for part in x.split(batch):
        statistic(part[:, None])  # [images, tokens, d_in]
    return statistic


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 6, 12])
def test_same_eigenpairs_as_the_svd_of_the_shift(shape: tuple[int, int], k: int) -> None:
    delta, x = layer(*shape)
    delta = delta.double()
    E, eigenvalues = by_svd(delta, x)
    of_values, of_projector = bounds(delta, x, k)
    for found in (statistic_of(delta, x, 200).subspace(k), essential_subspace(delta, x.double().T @ x.double(), len(x), k)):
        torch.testing.assert_close(found.eigenvalues, eigenvalues[:k], rtol=of_values, atol=0)
        projector = found.directions @ found.directions.T
        assert (projector - E[:, :k] @ E[:, :k].T).norm() < of_projector
        total = float(eigenvalues.sum())
        assert found.total == pytest.approx(total, abs=summed(len(x), torch.float64) * scale_of(delta, x))


@pytest.mark.parametrize("shape", SHAPES)
def test_batches_do_not_change_the_result(shape: tuple[int, int]) -> None:
    delta, x = layer(*shape)
    whole, parts = statistic_of(delta.double(), x, 200), statistic_of(delta.double(), x, 7)
    assert whole.gram.rows == parts.gram.rows == 200
    assert (whole.gram.matrix - parts.gram.matrix).norm() / whole.gram.matrix.norm() < summed(200, torch.float64)
    a, b = whole.subspace(6), parts.subspace(6)
    of_values, of_projector = bounds(delta, x, 6)
    torch.testing.assert_close(a.eigenvalues, b.eigenvalues, rtol=of_values, atol=0)
    assert (a.directions @ a.directions.T - b.directions @ b.directions.T).norm() < of_projector


@pytest.mark.parametrize("shape", SHAPES)
def test_few_directions_start_from_float32(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    delta, x = layer(*shape)
    exact = statistic_of(delta.double(), x, 200).subspace(4)
    monkeypatch.setattr(leading, "SIDE", 24)
    found = statistic_of(delta.double(), x, 200).subspace(4)
    assert found.total == exact.total
    assert not found.directions.equal(exact.directions)
    torch.testing.assert_close(found.eigenvalues, exact.eigenvalues, rtol=bounds(delta, x, 4)[0] + leading.ERROR**2, atol=0)
    off = (found.directions @ found.directions.T - exact.directions @ exact.directions.T).norm()
    assert off < 2 * leading.ERROR + bounds(delta, x, 4)[1]


@pytest.mark.parametrize(("shape", "side"), [((72, 24), 24), ((24, 96), 24), ((24, 24), 24)])
def test_the_smaller_gram_is_accumulated(shape: tuple[int, int], side: int) -> None:
    delta, x = layer(*shape)
    assert statistic_of(delta, x, 50).gram.matrix.shape == (side, side)


@pytest.mark.parametrize("shape", SHAPES)
def test_fewer_rows_than_outputs_cap_the_rank(shape: tuple[int, int]) -> None:
    delta, x = layer(*shape, n=9)
    found = statistic_of(delta.double(), x, 4).subspace(20)
    E, eigenvalues = by_svd(delta, x)
    assert found.directions.shape == (shape[0], 9)
    of_values, of_projector = bounds(delta, x, 9)
    torch.testing.assert_close(found.eigenvalues, eigenvalues[:9], rtol=of_values, atol=0)
    assert (found.directions @ found.directions.T - E[:, :9] @ E[:, :9].T).norm() < of_projector


@pytest.mark.parametrize("shape", SHAPES)
def test_rank_of_the_task_vector_caps_the_rank(shape: tuple[int, int]) -> None:
    """Also where the mean input, ten thousand times the rest, hardly meets the task vector."""
    generator = torch.Generator().manual_seed(3)
    o, i = shape
    down = torch.randn(5, i, generator=generator, dtype=torch.float64)
    delta = torch.randn(o, 5, generator=generator, dtype=torch.float64) @ down
    mean = torch.randn(i, generator=generator, dtype=torch.float64)
    mean -= down.T @ torch.linalg.lstsq(down.T, mean[:, None]).solution[:, 0]
    x = torch.randn(200, i, generator=generator, dtype=torch.float64) + 100 * mean
    assert len(statistic_of(delta, x, 50).subspace(20).eigenvalues) == 5


def test_float32_task_vectors_give_orthonormal_float32_directions() -> None:
    delta, x = layer(72, 24)
    found = statistic_of(delta, x, 50).subspace(12)
    assert found.directions.dtype == torch.float32
    assert found.eigenvalues.dtype == torch.float64
    condition = (scale_of(delta, x) / float(found.eigenvalues[-1])) ** 0.5
    assert_near(found.directions.T @ found.directions, torch.eye(12), direct(24, condition))


def test_one_input_gram_serves_several_task_vectors() -> None:
    delta, x = layer(72, 24)
    statistic = statistic_of(delta, x, 50)
    residual = layer(72, 24, seed=5)[0].double()
    found = essential_subspace(residual, statistic.gram.matrix, statistic.gram.rows, 6)
    torch.testing.assert_close(found.eigenvalues, by_svd(residual, x)[1][:6], rtol=bounds(residual, x, 6)[0], atol=0)


def test_nothing_moves_without_a_task_vector() -> None:
    found = ShiftStatistic(torch.zeros(72, 24)).subspace(6)
    assert found.directions.shape == (72, 0)
    assert found.eigenvalues.shape == (0,)
    assert found.total == 0


@pytest.mark.parametrize("shape", [(72, 24), (24, 72)])
def test_nor_where_its_inputs_were_seen(shape: tuple[int, int]) -> None:
    statistic = ShiftStatistic(torch.zeros(shape))
    statistic(torch.ones(1, shape[1]))
    found = statistic.subspace(6)
    assert (found.directions.shape, found.eigenvalues.shape, found.total) == ((shape[0], 0), (0,), 0)
    assert found.directions.dtype == torch.float32


def test_observed_rows_are_not_changed_and_leave_the_graph() -> None:
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    before = x.detach().clone()
    gram = RowGram()
    gram(x)
    gram(x)
    assert gram.rows == 12
    assert not gram.matrix.requires_grad
    assert_near(gram.matrix, 2 * before.flatten(0, 1).double().T @ before.flatten(0, 1).double(), summed(12, torch.float64))
    assert x.detach().equal(before)


def test_what_cannot_be_decomposed_is_refused() -> None:
    delta, x = layer(72, 24)
    with pytest.raises(ValueError, match="at least 2 input rows, not 1"):
        statistic_of(delta, x[:1], 1).subspace(3)
    with pytest.raises(ValueError, match="no layer inputs"):
        ShiftStatistic(delta).subspace(3)
    with pytest.raises(ValueError, match=r"\(72, 24\)"):
        essential_subspace(delta, torch.eye(72), 10, 3)


@pytest.mark.parametrize(("shape", "calls"), [((24, 12), 1), ((12, 24), 3)])
def test_a_task_vector_is_made_only_where_it_is_needed(shape: tuple[int, int], calls: int) -> None:
    delta, x = layer(*shape)
    made: list[int] = []
    statistic = ShiftStatistic(lambda: made.append(1) or delta, shape)
    for part in x.split(-(-len(x) // 3)):
        statistic(part)
    found = statistic.compact(3)
    assert len(made) == calls, "once a batch where the shift itself is observed, and else once at the end"
    torch.testing.assert_close(found.eigenvalues, statistic_of(delta, x, len(x)).compact(3).eigenvalues)
