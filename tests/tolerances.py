"""How far two ways to compute the same thing may lie apart: by the precision and the condition, on any processor.

Rounding depends on the processor's instructions and on the number of threads, which split and order sums in other ways. What
follows are first-order bounds in the spacing ``eps`` of floating-point numbers at 1, ``2**-23`` in float32 and ``2**-52`` in
float64. They are relative to the result's norm or largest entry, and hold for every order of the sums. (Higham, Accuracy and
Stability of Numerical Algorithms, 2002.)
"""

from collections.abc import Callable, Mapping

import torch
from synthetic import Zoo, moved
from torch import Tensor


def eps(dtype: torch.dtype = torch.float32) -> float:
    """Spacing of the numbers of a type at 1; rounding one number costs half of it."""
    return float(torch.finfo(dtype).eps)


def summed(terms: int, dtype: torch.dtype = torch.float32) -> float:
    """A sum of products, relative to the sum of their magnitudes.

    Never more than ``terms * eps``; as rounding errors are independent, in practice within a few times ``sqrt(terms) * eps``
    (Higham and Mary, SISC 2019).
    """
    return 4 * terms**0.5 * eps(dtype)


def direct(side: int, condition: float, dtype: torch.dtype = torch.float32) -> float:
    """A backward stable algorithm on a matrix itself: an SVD, a solution, the polar factor by way of a band.

    The input's own rounding is amplified by the condition number in the weakest direction; ``side`` stands for the sums.
    """
    return (side + condition) * eps(dtype)


def from_gram(condition: float) -> float:
    """What an eigendecomposition of a float64 Gram matrix finds in the weakest direction: polar factor, singular values.

    A Gram matrix is known to ``eps`` of its largest eigenvalue, and its smallest one is smaller by the square of the condition.
    """
    return condition**2 * eps(torch.float64)


def sum_from_gram(side: int, condition: float) -> float:
    """A sum of singular values from a float64 Gram matrix, such as the nuclear norm.

    An eigenvalue ``s**2`` that is off by ``eps * s_max**2`` makes ``s`` off by ``eps * s_max**2 / (2 s)``: by at most
    ``condition * eps`` of the largest, for each of ``side`` singular values.
    """
    return side * condition * eps(torch.float64)


def subspace(side: int, scale: float, gap: float) -> float:
    """The projector on leading eigenvectors of a float64 matrix of norm ``scale``, with ``gap`` from the last one to the next.

    (Davis and Kahan: the perturbation over the gap.)
    """
    return side * eps(torch.float64) * scale / gap


def forward(layers: int, width: int, dtype: torch.dtype = torch.float32) -> float:
    """A pass through ``layers`` layers in a row, each of which sums ``width`` products; relative to the largest output."""
    return layers * width**0.5 * eps(dtype)


def assert_near(found: Tensor, expected: Tensor, bound: float) -> None:
    """Compare with a bound relative to the largest entry of ``expected``."""
    assert found.shape == expected.shape
    found, expected = found.detach().double(), expected.detach().double()
    error, largest = float((found - expected).abs().max()), float(expected.abs().max())
    assert error <= bound * largest, f"off by {error / largest if largest else error:.1e} of the largest entry, not {bound:.1e}"


def of_formula(formula: Callable[..., Tensor], *inputs: Tensor, dtype: torch.dtype = torch.float32) -> float:
    """What a formula's result may be off by when a stable algorithm computes it in a precision, relative to the result's norm.

    Such an algorithm finds the exact result of inputs that are off by a few ``eps`` of their norm. How much that changes the
    result is the formula's condition, which is measured: by the formula itself, in float64, on inputs that are off so.
    """
    generator = torch.Generator().manual_seed(0)
    exact, change = formula(*inputs), 0.0
    for _ in range(3):
        moved = [x + eps(dtype) * x.square().mean().sqrt() * torch.randn(x.shape, generator=generator).double() for x in inputs]
        change = max(change, float((formula(*moved) - exact).norm() / exact.norm()))
    return 8 * (change + eps(dtype))


def of_model(formula: Callable[[Zoo], Mapping[str, Tensor]], zoo: Zoo) -> dict[str, float]:
    """The same for each key of a whole model, by its task vectors and layer inputs."""
    exact, changes = formula(zoo), []
    for seed in range(3):
        other = formula(moved(zoo, seed, eps()))
        changes.append({key: float((other[key] - value).norm()) for key, value in exact.items()})
    return {
        key: 8 * (max(change[key] for change in changes) / norm + eps()) if (norm := float(value.norm())) else 0.0
        for key, value in exact.items()
    }
