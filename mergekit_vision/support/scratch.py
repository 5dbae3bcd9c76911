"""Large tensors that are put aside for a while, in files instead of memory."""

import math
import os
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor

LARGE = 16 << 20
"""Bytes of a tensor that is worth a file of its own."""


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors one below the other, as ``torch.cat`` makes them; in a mapped file where they are large, and in main memory.

    It is a temporary file without a name (see ``TMPDIR``), which is gone with the tensor. The tensor is like any other, but its
    pages are the system's cache: where memory is short, they lie on the disk alone.

    >>> joined([torch.zeros(1, 2), torch.ones(1, 2)])
    tensor([[0., 0.],
            [1., 1.]])
    """
    first = parts[0]
    shape = (sum(len(part) for part in parts), *first.shape[1:])
    place = None if first.device.type != "cpu" else _in_a_file(shape, first.dtype)
    return torch.cat(list(parts)) if place is None else torch.cat(list(parts), out=place)


def _in_a_file(shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    """A tensor in a file; ``None`` where it is small, or the system has no such files, or no place for one."""
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE or not hasattr(os, "posix_fallocate"):
        return None
    try:
        with tempfile.NamedTemporaryFile(prefix="mergekit-vision-") as file:  # it loses its name when it is mapped
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk says so now; later the process would be ended
            return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).view(*shape)
    except (OSError, RuntimeError):  # the latter where it cannot be mapped
        return None
