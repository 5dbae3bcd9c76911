"""FeatCal: one layer of a merged model fitted to the experts' outputs on its own inputs, near an anchor.

For task ``t``, ``x`` are a layer's inputs in the merged model, ``x'`` those in the expert, and ``x + α (x' - x)`` the inputs at
which the expert's output is the target. Everything is about task vectors: changes of what the backbone has.
Source: FeatCal (2026, arXiv:2605.13030), in the form of the authors' code, but in float64 and about the backbone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mergekit_vision.functional.gram import gram
from mergekit_vision.functional.regression import semidefinite_solve

NORM_EPS = 1e-5
"""What layer normalizations add to the variance, in CLIP's encoders."""


class LinearFit(NamedTuple):
    """What a task says about a Linear layer, over the norm of its Gram matrix; fits add up over tasks. Float64.

    Attributes:
        gram: second moment of the merged model's inputs, ``[groups, d_in, d_in]``.
        target: second moment of those inputs and the wanted changes of the outputs, ``[groups, d_in, d_out / groups]``.
        mean: mean input, ``[groups, d_in]``.
        offset: mean wanted change of the outputs, that of the bias included, ``[groups, d_out / groups]``.
        weight: one over the norm of the Gram matrix, ``[groups]``.
    """

    gram: Tensor
    target: Tensor
    mean: Tensor
    offset: Tensor
    weight: Tensor

    def calibrate(self, weight: Tensor, bias: Tensor | None, ridge: float) -> tuple[Tensor, Tensor | None]:
        """Updates of weight ``[d_out, d_in]`` and bias ``[d_out]``, float64, of a sum of fits.

        Args:
            weight: update of the weight in the anchor.
            bias: that of the bias; ``None`` where it stays.
            ridge: what the anchor weighs.
        """
        groups = len(self.gram)
        targets = self.target + ridge * weight.double().view(groups, -1, weight.shape[1]).mT
        eye = ridge * torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
        U = torch.stack([semidefinite_solve(G + eye, target).T for G, target in zip(self.gram, targets, strict=True)])
        if bias is None:
            return U.flatten(0, 1), None
        offset = self.offset - (U @ self.mean[:, :, None])[:, :, 0] + ridge * bias.double().view(groups, -1)
        return U.flatten(0, 1), (offset / (self.weight[:, None] + ridge)).flatten()


class NormFit(NamedTuple):
    """What a task says about the gain and the offset of a layer normalization; fits add up over tasks. Float64, ``[d]``.

    Attributes:
        energy: mean square of each normalized channel.
        mean: its mean.
        gain: right-hand side of the gain's normal equation.
        offset: that of the offset's.
        weight: number of tasks, ``[]``.
    """

    energy: Tensor
    mean: Tensor
    gain: Tensor
    offset: Tensor
    weight: Tensor

    def calibrate(self, gain: Tensor, offset: Tensor | None, ridge: float) -> tuple[Tensor, Tensor | None]:
        """Updates of gain and offset, ``[d]``, float64, of a sum of fits; see :meth:`LinearFit.calibrate`."""
        a, b, c = self.energy + ridge, self.mean, self.weight + ridge
        right = self.gain + ridge * gain.double()
        if offset is None:
            return torch.where(a > 0, right / a, gain.double()), None
        below = self.offset + ridge * offset.double()
        determinant = a * c - b.square()
        known = determinant > 1e-12 * a * c  # else the channel never varies and nothing holds it: it takes the anchor
        safe = torch.where(known, determinant, 1.0)
        new = ((c * right - b * below) / safe, (a * below - b * right) / safe)
        return torch.where(known, new[0], gain.double()), torch.where(known, new[1], offset.double())


class PairedInputs:
    """Moments of a Linear layer's inputs in the merged model and in an expert, batch by batch, in float64.

    Args:
        base: the backbone's weight, ``[d_out, d_in]``.
        alpha: share of the expert's own inputs in those at which its output is the target, in [0, 1].
        patches: weight of all tokens but the first, for each of some groups of the layer's outputs, all of one size.
    """

    def __init__(self, base: Tensor, alpha: float, patches: Sequence[float] = (1.0,)) -> None:
        self._base, self._alpha = base, alpha
        self._groups = [_Means(weight) for weight in patches]
        self._waiting: list[Tensor] = []

    def merged(self, x: Tensor) -> None:
        """Observe the merged model's inputs of some images, ``[images, tokens, d_in]``; the expert's of the same come next."""
        self._waiting.append(x.detach())

    def expert(self, x: Tensor) -> None:
        """Observe the expert's inputs, in the same batches."""
        merged = self._waiting.pop(0)
        rows = merged.double().flatten(0, 1)
        shift = x.double().flatten(0, 1) - rows
        for group in self._groups:
            w = group.weights(merged)
            group.add(w.sum(), gram(rows * w.sqrt()), (rows * w).T @ shift, (rows * w).sum(0), (shift * w).sum(0))

    def fit(self, delta: Tensor, bias: Tensor | None) -> LinearFit:
        """This task's part, of the task vectors of weight and bias, ``[d_out, d_in]`` and ``[d_out]``."""
        groups = len(self._groups)
        G, cross, mean, shift = (torch.stack(means) for means in zip(*(group.means() for group in self._groups), strict=True))
        D = delta.double().view(groups, -1, delta.shape[1])
        W = self._alpha * (self._base.to(D).view_as(D) + D)
        offset = (D @ mean[:, :, None] + W @ shift[:, :, None])[:, :, 0]
        if bias is not None:
            offset = offset + bias.double().view(groups, -1)
        norm = torch.linalg.matrix_norm(G)
        weight = torch.where(norm > 0, norm, 1.0).reciprocal()
        column, matrix = weight[:, None], weight[:, None, None]
        return LinearFit(matrix * G, matrix * (G @ D.mT + cross @ W.mT), column * mean, column * offset, weight)


class NormInputs:
    """Moments of a layer normalization's normalized inputs in the merged model, batch by batch, in float64.

    Args:
        patches: weight of all tokens but the first.
    """

    def __init__(self, patches: float = 1.0) -> None:
        self._means = _Means(patches)

    def merged(self, x: Tensor) -> None:
        """Observe inputs, before normalization, ``[images, tokens, d]``."""
        w, z = self._means.weights(x), F.layer_norm(x.double(), x.shape[-1:], eps=NORM_EPS).flatten(0, 1)
        self._means.add(w.sum(), (z.square() * w).sum(0), (z * w).sum(0))

    def fit(self, gain: Tensor, offset: Tensor | None) -> NormFit:
        """This task's part, of the task vectors of gain and offset, ``[d]``."""
        energy, mean = self._means.means()
        g, o = gain.double(), torch.zeros_like(mean) if offset is None else offset.double()
        return NormFit(energy, mean, energy * g + mean * o, mean * g + o, torch.ones_like(energy[0]))


class _Means:
    """Weighted means over the tokens of all batches."""

    def __init__(self, patches: float) -> None:
        self._patches = patches
        self._sums: list[Tensor] = []

    def weights(self, x: Tensor) -> Tensor:
        """Weight of each token of ``[images, tokens, d]``, ``[images * tokens, 1]``."""
        weights = x.new_full((len(x), x.shape[1], 1), self._patches, dtype=torch.float64)
        weights[:, 0] = 1.0
        return weights.flatten(0, 1)

    def add(self, *sums: Tensor) -> None:
        """Add a batch: the sum of its weights, and weighted sums."""
        self._sums = [total.add_(more) for total, more in zip(self._sums, sums, strict=True)] if self._sums else list(sums)

    def means(self) -> list[Tensor]:
        """The means."""
        return [total / self._sums[0] for total in self._sums[1:]]
