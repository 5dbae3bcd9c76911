"""Memory that runs out, in one line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mergekit_vision.errors import InputError

_SPENT = re.compile(r"out of memory|(can't|cannot) allocate memory|not enough memory|failed to allocate", re.IGNORECASE)
_WANTED = re.compile(r"tried to allocate ([\d.]+ ?[a-z]+)", re.IGNORECASE)


@contextmanager
def explained_memory(work: str, device: torch.device) -> Iterator[None]:
    """Say what memory was missing for some work, and what would help.

    Args:
        work: what is done, such as "merging".
        device: on which.

    Raises:
        InputError: when Python, the CPU's allocator or an accelerator's has no memory left.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _SPENT.search(str(error)):
            raise
        wanted = _WANTED.search(str(error))
        needed = f" ({wanted[1]} more were needed at once)" if wanted else ""
        smaller = "merge fewer experts, take fewer proxy images or a smaller batch, or free memory"
        remedy = smaller if device.type == "cpu" else f"use the CPU (`accelerator` cpu), or {smaller}"
        raise InputError(f"{work} ran out of memory on {device}{needed}; {remedy}", of="trainer") from error
