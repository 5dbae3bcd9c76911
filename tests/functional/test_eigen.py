"""Where matrices are decomposed, with stand-ins for a GPU and for the clock."""

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from formulas import matrix
from tolerances import eps
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mergekit_vision.functional import eigen
from mergekit_vision.functional.eigen import eigh, example, is_faster_on_host, measured_side, on_host, seconds

Places = list[str]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """No test knows what another has measured."""
    for remembered in (is_faster_on_host, eigen._streams):
        remembered.cache_clear()
    yield
    for remembered in (is_faster_on_host, eigen._streams):
        remembered.cache_clear()


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Places:
    """Devices on which matrices were decomposed."""
    found, decompose = Places(), torch.linalg.eigh

    def noted(G: Tensor, **out: Any) -> tuple[Tensor, Tensor]:
        found.append(G.device.type)
        assert G.device.type == "cpu" or G.dtype == torch.float64
        return decompose(G, **out)  # type: ignore[no-any-return]

    monkeypatch.setattr(torch.linalg, "eigh", noted)
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda of: MagicMock())
    return found


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.dtype, int]]:
    """What was measured, by a clock to which the host is faster below a side of 512, and the device from there."""
    found = []

    def clock(decompose: Callable[[Tensor], tuple[Tensor, Tensor]], G: Tensor) -> float:
        found.append((G.device.type, G.dtype, len(G)))
        on_the_host = len(G) < 512
        return 1.0 if (decompose is on_host) == on_the_host else 2.0

    monkeypatch.setattr(eigen, "seconds", clock)
    return found


@pytest.mark.parametrize(
    ("side", "dtype", "place"),
    [(3, torch.float64, "cpu"), (300, torch.float64, "cpu"), (1025, torch.float64, "cuda"), (600, torch.float32, "cuda")],
)
def test_a_devices_matrix_is_decomposed_where_that_is_faster(
    side: int, dtype: torch.dtype, place: str, places: Places, measured: list[tuple[str, torch.dtype, int]]
) -> None:
    with FakeTensorMode():  # knows shapes and devices, also of a device that is not there
        values, vectors = eigh(torch.empty(side, side, dtype=dtype, device="cuda"))
    assert places == [place]
    assert (values.shape, vectors.shape) == ((side,), (side, side))
    assert {(part.device.type, part.dtype) for part in (values, vectors)} == {("cuda", dtype)}
    assert measured == [("cuda", torch.float64, measured_side(side))] * 2


def test_measures_once_for_each_device_and_size(places: Places, measured: list[tuple[str, torch.dtype, int]]) -> None:
    with FakeTensorMode():
        for side in (300, 512, 700, 1024):
            eigh(torch.empty(side, side, dtype=torch.float64, device="cuda"))
        eigh(torch.empty(300, 300, device="cuda"))
        eigh(torch.empty(300, 300, device="cuda:1"))
    assert measured == [("cuda", torch.float64, side) for side in (256, 512, 256) for _ in range(2)]


def test_does_not_measure_where_runs_must_repeat_each_other(
    places: Places, measured: list[tuple[str, torch.dtype, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with FakeTensorMode():
        eigh(torch.empty(300, 300, dtype=torch.float64, device="cuda"))
    assert (places, measured) == (["cuda"], [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_a_cpu_it_is_torchs_own(dtype: torch.dtype, measured: list[tuple[str, torch.dtype, int]]) -> None:
    G = matrix(40, 40, 10.0)
    G = (G @ G.T).to(dtype)
    assert all(map(torch.equal, eigh(G), torch.linalg.eigh(G)))
    assert not measured


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_host_gives_back_values_and_vectors(dtype: torch.dtype) -> None:
    G = matrix(40, 40, 10.0)
    G = G @ G.T
    values, vectors = on_host(G.to(dtype))
    assert (values.dtype, vectors.dtype) == (dtype, dtype)
    whole = vectors.double() @ torch.diag(values.double()) @ vectors.double().T
    assert (whole - G).norm() <= 40 * eps(dtype) * G.norm()


def test_the_clock_stops_when_the_second_of_two_has_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = 0.0, []

    def decompose(G: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal now
        calls.append(G)
        now += 10.0 if len(calls) == 1 else 3.0  # the first loads libraries
        return G.diagonal(), G

    monkeypatch.setattr(eigen.time, "perf_counter", lambda: now)
    assert seconds(decompose, torch.eye(2)) == 3.0
    assert len(calls) == 2


def test_what_is_measured_has_a_decomposition_like_others() -> None:
    """Symmetric, well-conditioned, and with eigenvalues apart, so that none is split off early."""
    G = example(64, torch.float64)
    values = torch.linalg.eigvalsh(G)
    assert torch.equal(G, G.T)
    assert 0.38 < float(values[0]) < float(values[-1]) < 10
    assert float(values.diff().min()) > 1e-5
