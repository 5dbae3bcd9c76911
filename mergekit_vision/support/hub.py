"""The Hugging Face hub, where it cannot or must not be reached."""

import queue
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from http.client import HTTPException

_PATIENCE = 5.0  # seconds for a connection
_KNOWN = 60.0  # seconds for which the answer holds


@contextmanager
def without_retries() -> Iterator[None]:
    """Have the hub's library look into its cache at once where the hub cannot be reached, instead of trying for half a minute.

    It is one connection that is tried. Behind a proxy, which knows other ways, the library tries as it always does.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _reachable(constants.ENDPOINT, time.monotonic() // _KNOWN):
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


@contextmanager
def offline() -> Iterator[None]:
    """Have the hub's library, and those that build on it, look into its cache and nowhere else while the context is open."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def request_errors() -> tuple[type[Exception], ...]:
    """What the hub's library raises where a request fails: its own errors, the system's, and those of what it sends requests by.

    That is httpx, httpx2 or requests, by its version, and the parent of all their errors is a parent of the library's own.
    """
    from huggingface_hub.utils import HfHubHTTPError

    return (OSError, HfHubHTTPError, *(parent for parent in HfHubHTTPError.__mro__ if parent.__name__ == "HTTPError"))


@lru_cache(maxsize=2)
def _reachable(endpoint: str, _: float) -> bool:
    if urllib.request.getproxies():
        return True
    address = urllib.parse.urlsplit(endpoint)
    try:
        port = address.port or {"http": 80}.get(address.scheme, 443)
        socket.create_connection((address.hostname or "", port), timeout=_PATIENCE).close()
    except ValueError:  # no address: the library says what is wrong with it
        return True
    except OSError:
        return False
    return True


def refusal(address: str, seconds: float) -> str | None:
    """Why an HTTP server does not answer within a time; ``None`` where it does, whatever it says.

    Args:
        address: of the server.
        seconds: for the answer, names looked up included.
    """
    found: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=lambda: found.put(_asked(address, seconds)), daemon=True).start()  # a look-up knows no time limit
    try:
        return found.get(timeout=seconds + 0.5)
    except queue.Empty:
        return f"no answer within {seconds:g} s"


def _asked(address: str, seconds: float) -> str | None:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=seconds):
            return None
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError, HTTPException) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
