"""Band forms against the matrices that they were made of."""

import math

import pytest
import torch
from tolerances import direct

from mergekit_vision.functional.banded import Band, BandForm


def dense(band: Band) -> torch.Tensor:
    return band.times(torch.eye(sum(band.sizes), dtype=band.diagonal[0].dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "block"), [(1, 4), (4, 4), (5, 4), (24, 8), (30, 8)])
def test_band_and_reflections_give_the_matrix_back(n: int, block: int, dtype: torch.dtype) -> None:
    M = torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype)
    form, eye = BandForm.of(M, block), torch.eye(n, dtype=dtype)
    B, Q, Pt = dense(form.band), form.left_times(eye), form.right_adjoint_times(eye)
    row, column = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    assert not B[(column < row) | (column > row + block)].any()
    bound = direct(n, 1.0, dtype)
    assert (Q @ B @ Pt - M).norm() <= bound * M.norm()
    assert (Q.T @ Q - eye).norm() <= bound * n**0.5
    assert (Pt @ Pt.T - eye).norm() <= bound * n**0.5


@pytest.mark.parametrize("rank", [0, 1, 7])
def test_matrices_with_nothing_to_reflect(rank: int) -> None:
    """Columns that are zero below the diagonal already need no reflection."""
    M = torch.diag((torch.arange(12) < rank).double())
    form = BandForm.of(M, 4)
    assert (form.left_times(form.band.times(form.right_adjoint_times(torch.eye(12).double()))) - M).abs().max() <= 1e-15


@pytest.mark.parametrize("values", [(1.0, 1.0, 1.0), (1.0, 1.0, 0.7), (3.0, 1.0, 1.0), (1.0, 0.5, 1e-3), (1.0, 1e-6, 1e-6)])
@pytest.mark.parametrize("start", [(1.0, 1.0), (2.0, 1.0), (1.0, -0.5)])
def test_bounds_of_the_singular_values(values: tuple[float, float, float], start: tuple[float, float]) -> None:
    """The largest and the smallest belong to directions that an iteration might start at right angles to."""
    first, middle, last = values
    vectors = torch.eye(200, dtype=torch.float64)
    vectors[:2, :2] = torch.tensor([start, (-start[1], start[0])], dtype=torch.float64) / math.hypot(*start)
    S = torch.tensor([first, last, *[middle] * 198], dtype=torch.float64)
    low, high = BandForm.of(vectors.T @ torch.diag(S) @ vectors, 8).band.singular_values_within()
    assert 0.5 * (1 - 1e-6) * float(S.min()) <= low <= float(S.min())
    assert float(S.max()) * (1 - 1e-12) <= high <= 2 * float(S.max())


def test_no_bounds_of_a_singular_matrix() -> None:
    for M in (torch.zeros(20, 20), torch.full((20, 20), torch.nan), torch.ones(20, 20)):
        low, high = BandForm.of(M, 8).band.double().singular_values_within()
        assert not high < 1e7 * low
