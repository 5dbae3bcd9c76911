"""Eigendecompositions of symmetric matrices, on an accelerator or beside it: where they are faster.

Half of a dense eigendecomposition is matrix times vector, and many graphics cards compute in float64 at a 32nd or 64th of the
speed of float32. The processor's LAPACK can then be faster, the way there and back included. Which one is cannot be known from a
device's name, so it is measured.
"""

import time
from collections.abc import Callable
from functools import cache
from queue import SimpleQueue
from threading import Lock

import torch
from torch import Tensor

from mergekit_vision.functional.threads import MOST

SMALLEST, LARGEST = 64, 512
"""Sides between which it is measured what is faster; the choice for other matrices is that for the nearer one of these sides."""

Decomposition = tuple[Tensor, Tensor]
"""Eigenvalues, ascending, and eigenvectors."""

_measuring = Lock()


def eigh(G: Tensor) -> Decomposition:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix.

    Exactly ``torch.linalg.eigh`` on a CPU. On an accelerator it runs there or on the CPU, which differ in rounding and in the
    eigenvectors' signs. Where torch is told to use deterministic algorithms only, it always runs there, as what is faster may be
    another in the next run. Different processes may choose differently: do not call this where all of them need the same
    eigenvectors. Gradients are not recorded.

    Args:
        G: ``[n, n]``, float32 or float64.

    Returns:
        ``[n]`` and ``[n, n]``, with the device and dtype of ``G``.

    >>> eigh(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))[0]
    tensor([1., 2.])
    """
    G = G.detach()
    if G.device.type == "cpu":
        return _decomposed(G)
    with _measuring:  # several at once would measure each other
        fixed = torch.are_deterministic_algorithms_enabled()
        on_the_host = not fixed and is_faster_on_host(G.device, measured_side(len(G)))
    return on_host(G) if on_the_host else on_device(G)


def on_device(G: Tensor) -> Decomposition:
    """Decompose a matrix where it is, in float64: cuSOLVER's float32 eigenvectors of a few hundred rows are off by 1e-4.

    Of CUDA this is done on a stream of its own: one decomposition leaves most of a device idle, and those of several threads run
    side by side. What is returned belongs to the caller's stream.
    """
    if G.device.type != "cuda":
        return _decomposed(G)
    streams, matrix = _streams(G.device), G.double()
    found = matrix.new_empty(len(G)), torch.empty_like(matrix)
    own = streams.get()
    try:
        own.wait_stream(torch.cuda.current_stream(G.device))
        with torch.cuda.stream(own):
            torch.linalg.eigh(matrix, out=found)
        own.synchronize()
    finally:
        streams.put(own)
    return found[0].to(G.dtype), found[1].to(G.dtype)


@cache
def _streams(device: torch.device) -> "SimpleQueue[torch.cuda.Stream]":
    """Streams to decompose matrices on, as many as threads do so at once; more would each hold on to memory."""
    found: SimpleQueue[torch.cuda.Stream] = SimpleQueue()
    for _ in range(MOST):
        found.put(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
    return found


def on_host(G: Tensor) -> Decomposition:
    """Decompose a matrix on the CPU, and take the result to where the matrix is."""
    values, vectors = _decomposed(G.cpu())
    return values.to(G.device), vectors.to(G.device)


def _decomposed(G: Tensor) -> Decomposition:
    values, vectors = torch.linalg.eigh(G)
    return values, vectors


def measured_side(n: int) -> int:
    """Side that is measured in place of ``n``: the last power of two, within limits as it takes time.

    >>> [measured_side(n) for n in (3, 64, 300, 768, 3072)]
    [64, 64, 256, 512, 512]
    """
    return min(max(SMALLEST, 1 << n.bit_length() >> 1), LARGEST)


@cache
def is_faster_on_host(device: torch.device, side: int) -> bool:
    """Whether matrices on a device are decomposed faster on the CPU, both transfers included; measured once in a process."""
    G = example(side).to(device)
    return seconds(on_host, G) < seconds(on_device, G)


def seconds(decompose: Callable[[Tensor], Decomposition], G: Tensor) -> float:
    """Time of one decomposition, after another one that loads libraries and takes memory."""

    def finished() -> None:
        decompose(G)[0][-1].item()  # a device computes on while the host goes ahead, until a number is asked for

    finished()
    start = time.perf_counter()
    finished()
    return time.perf_counter() - start


def example(side: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A matrix for measurements: ``1 / (1 + |i - j|)``, positive definite, with simple eigenvalues from 0.38 to about ``2 ln n``.

    Like that of a Gram matrix, its decomposition can leave out no step.
    """
    at = torch.arange(side, dtype=dtype)
    return 1 / (1 + (at[:, None] - at).abs())
