"""The Hugging Face hub, where it cannot be reached."""

import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

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
