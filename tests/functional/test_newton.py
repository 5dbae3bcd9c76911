"""Newton's iteration against full SVDs."""

import pytest
import torch
from formulas import exact_polar, matrix
from tolerances import direct

from mergekit_vision.functional import newton
from mergekit_vision.functional.newton import newton_polar


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is large in practice would be slow here."""
    monkeypatch.setattr(newton, "SIDE", 32)


@pytest.mark.parametrize("shape", [(64, 64), (64, 40), (40, 64)])
@pytest.mark.parametrize("cond", [1.0, 1e3, 1e5])
def test_agrees_with_the_svd(shape: tuple[int, int], cond: float) -> None:
    M = matrix(*shape, cond).float()
    found = newton_polar(M)
    assert found.dtype == torch.float32
    assert (found - exact_polar(M.double())).norm() / found.norm() < direct(min(shape), cond)


def test_converges_in_as_many_steps_as_the_scaling_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, invert = [], torch.linalg.inv_ex
    monkeypatch.setattr(torch.linalg, "inv_ex", lambda X: steps.append(1) or invert(X))
    newton_polar(matrix(64, 64, 1e3).float())
    assert 0 < len(steps) <= 7


def test_leaves_to_others_what_it_is_not_made_for() -> None:
    assert newton_polar(matrix(64, 64, 10)) is None  # float64
    assert newton_polar(matrix(64, 24, 10).float()) is None  # small
    assert newton_polar(matrix(64, 64, 10, rank=40).float()) is None  # no unique polar factor
    assert newton_polar(torch.zeros(64, 64)) is None
