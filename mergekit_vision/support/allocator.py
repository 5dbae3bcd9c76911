"""Memory that was freed, but that the C library keeps for itself."""

import ctypes
import sys
from collections.abc import Callable
from functools import cache


def release_freed_memory() -> None:
    """Hand freed memory back to the system, where the C library is one that can be told to (glibc).

    It keeps freed blocks of up to 32 MiB in a pool of every thread. Merging and reading old checkpoints free many of these, in
    ever other sizes: without this a third of the peak would be memory that nobody uses.
    """
    if (trim := _trim()) is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another C library
        return None
    return found
