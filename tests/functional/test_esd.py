import pytest
import torch
from torch import Tensor

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


def statistic_of(delta: Tensor, x: Tensor, batch: int) -> ShiftStatistic:
    statistic = ShiftStatistic(delta)
    for part in x.split(batch):
        statistic(part[:, None])  # [images, tokens, d_in]
    return statistic


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 6, 12])
def test_same_eigenpairs_as_the_svd_of_the_shift(shape, k):
    delta, x = layer(*shape)
    delta = delta.double()
    E, eigenvalues = by_svd(delta, x)
    for found in (statistic_of(delta, x, 200).subspace(k), essential_subspace(delta, x.double().T @ x.double(), len(x), k)):
        torch.testing.assert_close(found.eigenvalues, eigenvalues[:k], rtol=1e-9, atol=0)
        projector = found.directions @ found.directions.T
        assert (projector - E[:, :k] @ E[:, :k].T).norm() < 1e-8
        assert found.total == pytest.approx(float(eigenvalues.sum()), rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_batches_do_not_change_the_result(shape):
    delta, x = layer(*shape)
    whole, parts = statistic_of(delta.double(), x, 200), statistic_of(delta.double(), x, 7)
    assert whole.gram.rows == parts.gram.rows == 200
    assert (whole.gram.matrix - parts.gram.matrix).norm() / whole.gram.matrix.norm() < 1e-12
    a, b = whole.subspace(6), parts.subspace(6)
    torch.testing.assert_close(a.eigenvalues, b.eigenvalues, rtol=1e-11, atol=0)
    assert (a.directions @ a.directions.T - b.directions @ b.directions.T).norm() < 1e-9


@pytest.mark.parametrize(("shape", "side"), [((72, 24), 24), ((24, 96), 24), ((24, 24), 24)])
def test_the_smaller_gram_is_accumulated(shape, side):
    delta, x = layer(*shape)
    assert statistic_of(delta, x, 50).gram.matrix.shape == (side, side)


@pytest.mark.parametrize("shape", SHAPES)
def test_fewer_rows_than_outputs_cap_the_rank(shape):
    delta, x = layer(*shape, n=9)
    found = statistic_of(delta.double(), x, 4).subspace(20)
    E, eigenvalues = by_svd(delta, x)
    assert found.directions.shape == (shape[0], 9)
    torch.testing.assert_close(found.eigenvalues, eigenvalues[:9], rtol=1e-7, atol=0)
    assert (found.directions @ found.directions.T - E @ E.T).norm() < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_rank_of_the_task_vector_caps_the_rank(shape):
    """Also where the mean input, ten thousand times the rest, hardly meets the task vector."""
    generator = torch.Generator().manual_seed(3)
    o, i = shape
    down = torch.randn(5, i, generator=generator, dtype=torch.float64)
    delta = torch.randn(o, 5, generator=generator, dtype=torch.float64) @ down
    mean = torch.randn(i, generator=generator, dtype=torch.float64)
    mean -= down.T @ torch.linalg.lstsq(down.T, mean[:, None]).solution[:, 0]
    x = torch.randn(200, i, generator=generator, dtype=torch.float64) + 100 * mean
    assert len(statistic_of(delta, x, 50).subspace(20).eigenvalues) == 5


def test_float32_task_vectors_give_orthonormal_float32_directions():
    delta, x = layer(72, 24)
    found = statistic_of(delta, x, 50).subspace(12)
    assert found.directions.dtype == torch.float32
    assert found.eigenvalues.dtype == torch.float64
    assert (found.directions.T @ found.directions - torch.eye(12)).abs().max() < 1e-6


def test_one_input_gram_serves_several_task_vectors():
    delta, x = layer(72, 24)
    statistic = statistic_of(delta, x, 50)
    residual = layer(72, 24, seed=5)[0].double()
    found = essential_subspace(residual, statistic.gram.matrix, statistic.gram.rows, 6)
    torch.testing.assert_close(found.eigenvalues, by_svd(residual, x)[1][:6], rtol=1e-9, atol=0)


def test_nothing_moves_without_a_task_vector():
    found = ShiftStatistic(torch.zeros(72, 24)).subspace(6)
    assert found.directions.shape == (72, 0)
    assert found.eigenvalues.shape == (0,)
    assert found.total == 0


def test_observed_rows_are_not_changed_and_leave_the_graph():
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    before = x.detach().clone()
    gram = RowGram()
    gram(x)
    gram(x)
    assert gram.rows == 12
    assert not gram.matrix.requires_grad
    torch.testing.assert_close(gram.matrix, 2 * before.flatten(0, 1).double().T @ before.flatten(0, 1).double())
    assert x.detach().equal(before)


def test_what_cannot_be_decomposed_is_refused():
    delta, x = layer(72, 24)
    with pytest.raises(ValueError, match="at least 2 input rows, not 1"):
        statistic_of(delta, x[:1], 1).subspace(3)
    with pytest.raises(ValueError, match="no layer inputs"):
        ShiftStatistic(delta).subspace(3)
    with pytest.raises(ValueError, match=r"\(72, 24\)"):
        essential_subspace(delta, torch.eye(72), 10, 3)
