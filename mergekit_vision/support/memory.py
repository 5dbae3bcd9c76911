"""Errors that say that there is no memory left."""

import re

_SPENT = re.compile(r"out of memory|(can't|cannot) allocate memory|not enough memory|failed to allocate", re.IGNORECASE)
_WANTED = re.compile(r"tried to allocate ([\d.]+ ?[a-z]+)", re.IGNORECASE)


def is_spent(error: Exception) -> bool:
    """Whether an error of Python, of the system or of one of torch's allocators says so.

    >>> is_spent(MemoryError()), is_spent(RuntimeError("shapes do not fit"))
    (True, False)
    """
    return isinstance(error, MemoryError) or bool(_SPENT.search(str(error)))


def wanted(error: Exception) -> str | None:
    """What could not be allocated, where the error says it.

    >>> wanted(RuntimeError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"))
    '2.50 GiB'
    """
    found = _WANTED.search(str(error))
    return found[1] if found else None
