"""Partial fractions against the roots that they approximate."""

import pytest
import torch

from mergekit_vision.functional.zolotarev import InverseRoot


@pytest.mark.parametrize(("low", "high"), [(1.0, 2.0), (1e-4, 1.0), (3.0, 3e7), (1e-29, 1e-16), (1e3, 1e16)])
def test_the_fractions_are_the_fewest_and_the_best(low: float, high: float) -> None:
    tol = 1e-5
    root = InverseRoot.on(low, high, tol)
    x = torch.logspace(torch.tensor(low).log10().item(), torch.tensor(high).log10().item(), 5000, dtype=torch.float64)
    ratio = sum(w / (x + s) for s, w in zip(root.shifts, root.weights, strict=True)) * x.sqrt() - 1
    assert float(ratio.abs().max()) <= 1.01 * root.error <= 1.01 * tol
    ends = ratio[1:-1][(ratio[1:-1] - ratio[:-2]) * (ratio[2:] - ratio[1:-1]) < 0]
    assert len(ends) >= 2 * len(root.shifts) - 2, "the error of a best approximation oscillates between its bounds"
    assert float(ends.abs().min()) > 0.9 * root.error
    exact = sum(w / 2 * torch.log1p(x / s) for s, w in zip(root.shifts, root.weights, strict=True)) + root.constant
    assert float((exact - x.sqrt()).abs().max()) < tol * high**0.5
