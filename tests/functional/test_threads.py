import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from mergekit_vision.functional import threads as module
from mergekit_vision.functional.threads import in_threads


@pytest.fixture(params=[1, 4])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_shares_the_threads_out_and_gives_them_back(threads: int) -> None:
    def look(_: int) -> tuple[int, int, bool]:
        met.wait(timeout=30)  # passes only when all are at work at once
        return threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()

    met = threading.Barrier(threads)
    found = in_threads(look, range(threads))
    assert len({ident for ident, _, _ in found}) == threads
    assert {(count, grad) for _, count, grad in found} == {(1, False)}
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


def test_keeps_the_order_and_passes_errors_on(threads: int) -> None:
    assert in_threads(lambda n: -n, iter(range(10))) == [-n for n in range(10)]
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda n: 1 / n, [1, 0])
    assert torch.get_num_threads() == threads


def test_within_a_worker_it_is_a_plain_loop(threads: int) -> None:
    """The number of threads is torch's for all: workers must not change it while others sum."""

    def inner(_: int) -> tuple[int, int]:
        return threading.get_ident(), torch.get_num_threads()

    def outer(_: int) -> bool:
        return in_threads(inner, range(5)) == [(threading.get_ident(), 1)] * 5

    assert all(in_threads(outer, range(4)))
    assert torch.get_num_threads() == threads
    met = threading.Barrier(threads)
    in_threads(lambda _: met.wait(timeout=30), range(threads))  # outside of workers it is none again


def test_leaves_cuda_alone_where_that_is_not_in_use(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a context of no stream would initialize it where there is a device."""
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: pytest.fail("initializes CUDA"))
    assert in_threads(lambda n: -n, range(3)) == [0, -1, -2]


def test_workers_are_on_the_device_of_the_callers_stream(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread begins on the first device."""
    stream, on = SimpleNamespace(device=torch.device("cuda", 1)), {threading.get_ident(): torch.device("cuda", 1)}

    def entered(given: object) -> AbstractContextManager[None]:
        assert given is stream
        assert on[threading.get_ident()] == stream.device
        return nullcontext()

    monkeypatch.setattr(module, "_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: on.update({threading.get_ident(): device}))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    assert in_threads(lambda n: -n, range(3)) == [0, -1, -2]
