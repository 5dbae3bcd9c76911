"""A layer fitted to several experts at once, each weighted by the inputs it sees and by the outputs that matter to its task.

Tam et al., "Merging by Matching Models in Task Parameter Subspaces" (TMLR 2024, arXiv:2312.04339), solve the same equations with
the experts' own Fisher matrices and no anchor.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_vision.functional.eigen import eigh
from mergekit_vision.functional.gram import gram, symmetric, triangle

ROUND_OFF = 1e-14
"""Mean square of gradients below which they are rounding errors of float32 class probabilities."""
HELD = 4 << 30
"""Bytes of curvatures that are held at once; each further part of a model's layers costs a run of the proxy images."""
TOLERANCE = 1e-6
"""Residual, relative to the right-hand side, at which conjugate gradients stop."""
ITERATIONS = 300
"""Steps of conjugate gradients at most."""


class Curvature(NamedTuple):
    """How much a task's loss depends on a layer's weight, as a Kronecker product: the upper triangles of two symmetric matrices.

    Attributes:
        inputs: second moment of the layer's inputs, of Frobenius norm 1 unless zero, ``[d_in (d_in + 1) / 2]``, float64.
        outputs: second moment of the loss's gradient by its outputs, of mean diagonal entry 1 unless zero,
            ``[d_out (d_out + 1) / 2]``, float64.
    """

    inputs: Tensor
    outputs: Tensor

    def matrices(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Both as matrices, for a weight of that shape, ``(d_out, d_in)``."""
        return symmetric(self.inputs, shape[1]), symmetric(self.outputs, shape[0])


class CurvatureMoments:
    """Sums of a :class:`Curvature` over batches."""

    def __init__(self) -> None:
        self._inputs: Tensor | float = 0.0
        self._outputs: Tensor | float = 0.0
        self._rows = 0

    def __call__(self, x: Tensor, gradient: Tensor) -> None:
        """Observe inputs ``[images, tokens, d_in]`` and gradients ``[images, tokens, d_out]``."""
        self._inputs = self._inputs + gram(x.double().flatten(0, -2))
        self._outputs = self._outputs + gram(gradient.double().flatten(0, -2))
        self._rows += x.shape[:-1].numel()

    def curvature(self, floor: float) -> Curvature:
        """The normalized sums; outputs count equally to the share ``floor``, in [0, 1].

        Raises:
            ValueError: when nothing was observed.
        """
        if not isinstance(self._inputs, Tensor) or not isinstance(self._outputs, Tensor):
            raise ValueError("no inputs were observed")
        G, H = self._inputs, self._outputs
        tiny = torch.finfo(G.dtype).tiny
        mean = H.diagonal().mean()
        certain = float(mean) <= self._rows * ROUND_OFF  # the model says what the expert does
        H = torch.zeros_like(H) if certain else H / mean
        H = (1 - floor) * H + floor * torch.eye(len(H), dtype=H.dtype, device=H.device)
        return Curvature(triangle(G / torch.linalg.matrix_norm(G).clamp(min=tiny)), triangle(H))


def fisher_fit(deltas: Sequence[Tensor], curvatures: Sequence[Curvature], anchor: Tensor, ridge: float) -> Tensor:
    """The ``M [d_out, d_in]`` with ``Σ_t H_t (M - Δ_t) G_t + ridge (M - A) = 0``, float64.

    By conjugate gradients from ``A``, preconditioned by what the solution were if every task had the mean curvature: some thirty
    steps; after :data:`ITERATIONS` the result is what it is.

    Args:
        deltas: task vectors ``Δ_t``, ``[d_out, d_in]``.
        curvatures: with the matrices ``G_t`` and ``H_t`` of each.
        anchor: ``A``, ``[d_out, d_in]``.
        ridge: pull of the anchor, above 0.
    """
    A, pairs = anchor.double(), [curvature.matrices(anchor.shape) for curvature in curvatures]
    precondition = _preconditioner(pairs, ridge)

    def applied(M: Tensor) -> Tensor:
        return sum((H @ M @ G for G, H in pairs), ridge * M)

    residual = sum((H @ (delta.double() - A) @ G for delta, (G, H) in zip(deltas, pairs, strict=True)), torch.zeros_like(A))
    enough = TOLERANCE * residual.norm()
    step, direction, energy = torch.zeros_like(A), torch.zeros_like(A), torch.ones_like(enough)
    for _ in range(ITERATIONS):
        if residual.norm() <= enough:
            break
        downhill = precondition(residual)
        before, energy = energy, (residual * downhill).sum()
        direction = downhill + energy / before * direction
        image = applied(direction)
        length = energy / (direction * image).sum()
        step += length * direction
        residual = residual - length * image
    return A + step


def _preconditioner(pairs: Sequence[tuple[Tensor, Tensor]], ridge: float) -> Callable[[Tensor], Tensor]:
    """The solution for a right-hand side ``[d_out, d_in]`` if every task had the mean curvature."""
    (g, V), (h, U) = (eigh(sum(parts[1:], parts[0])) for parts in zip(*pairs, strict=True))
    gains = 1 / (h.clamp(min=0)[:, None] * g.clamp(min=0) / len(pairs) + ridge)
    return lambda M: U @ (gains * (U.T @ M @ V)) @ V.T
