"""Eigendecompositions of symmetric matrices, on an accelerator or beside it: where they are faster.

Half of a dense eigendecomposition is matrix times vector, and many graphics cards compute in float64 at a 32nd or 64th of the
speed of float32. The processor's LAPACK can then be faster, the way there and back included. Which one is cannot be known from a
device's name, so it is measured.
"""

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

SMALLEST = 64
"""Side from which it is measured what is faster; the choice for smaller matrices is that for this side."""


def eigh(G: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix.

    Exactly ``torch.linalg.eigh`` on a CPU. On an accelerator it runs there or on the CPU, which differ in rounding and in the
    eigenvectors' signs. Where torch is told to use deterministic algorithms only, it always runs there, as what is faster may be
    another in the next run. Different processes may choose differently: do not call this where all of them need the same
    eigenvectors.

    Args:
        G: ``[n, n]``, float32 or float64.

    Returns:
        ``[n]`` and ``[n, n]``, with the device and dtype of ``G``.

    >>> eigh(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))[0]
    tensor([1., 2.])
    """
    fixed = G.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
    if fixed or not is_faster_on_host(G.device, G.dtype, measured_side(len(G))):
        return on_device(G)
    return on_host(G)


def on_device(G: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose a matrix where it is."""
    values, vectors = torch.linalg.eigh(G)
    return values, vectors


def on_host(G: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose a matrix on the CPU, and take the result to where the matrix is."""
    values, vectors = torch.linalg.eigh(G.cpu())
    return values.to(G.device), vectors.to(G.device)


def measured_side(n: int) -> int:
    """Side that is measured in place of ``n``: the last power of two, which takes little time.

    >>> [measured_side(n) for n in (3, 64, 768, 1024)]
    [64, 64, 512, 1024]
    """
    return max(SMALLEST, 1 << n.bit_length() >> 1)


@cache
def is_faster_on_host(device: torch.device, dtype: torch.dtype, side: int) -> bool:
    """Whether matrices on a device are decomposed faster on the CPU, both transfers included; measured once in a process."""
    G = example(side, dtype).to(device)
    return seconds(on_host, G) < seconds(on_device, G)


def seconds(decompose: Callable[[Tensor], tuple[Tensor, Tensor]], G: Tensor) -> float:
    """Time of one decomposition, after another one that loads libraries and takes memory."""

    def finished() -> None:
        decompose(G)[0][-1].item()  # a device computes on while the host goes ahead, until a number is asked for

    finished()
    start = time.perf_counter()
    finished()
    return time.perf_counter() - start


def example(side: int, dtype: torch.dtype) -> Tensor:
    """A matrix for measurements: ``1 / (1 + |i - j|)``, positive definite, with simple eigenvalues from 0.38 to about ``2 ln n``.

    Like that of a Gram matrix, its decomposition can leave out no step.
    """
    at = torch.arange(side, dtype=dtype)
    return 1 / (1 + (at[:, None] - at).abs())
