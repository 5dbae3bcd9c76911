"""Memory that runs out, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mergekit_vision.errors import InputError
from mergekit_vision.support.memory import is_spent, wanted


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
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_spent(error):
            raise
        size = wanted(error)
        needed = f" ({size} more were needed at once)" if size else ""
        smaller = "merge fewer experts, take fewer proxy images or a smaller batch, or free memory"
        remedy = smaller if device.type == "cpu" else f"use the CPU (`accelerator` cpu), or {smaller}"
        raise InputError(f"{work} ran out of memory on {device}{needed}; {remedy}", of="trainer") from error
