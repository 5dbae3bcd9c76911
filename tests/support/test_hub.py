"""A hub that cannot be reached is not tried again and again."""

import socket
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from mergekit_vision.support import hub
from mergekit_vision.support.hub import without_retries


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No answer and no proxy of before."""
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub._reachable.cache_clear()
    yield
    hub._reachable.cache_clear()


def offline_inside(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    with without_retries():
        found = constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
    return found


def test_the_cache_alone_is_looked_into_where_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not offline_inside(f"http://127.0.0.1:{port}", monkeypatch)
    hub._reachable.cache_clear()
    assert offline_inside(f"http://127.0.0.1:{port}", monkeypatch)


def test_what_is_no_address_and_what_a_proxy_reaches_is_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not offline_inside("http://127.0.0.1:port", monkeypatch)
    monkeypatch.setattr(hub.urllib.request, "getproxies", lambda: {"https": "http://proxy:3128"})
    assert not offline_inside("http://127.0.0.1:9", monkeypatch)


def test_it_ends_with_the_context_however_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="broken"), without_retries():
        raise OSError("broken")
    assert not constants.HF_HUB_OFFLINE
