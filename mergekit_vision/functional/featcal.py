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
        U = torch.stack([_ridge_solve(G, target, ridge).T for G, target in zip(self.gram, targets, strict=True)])
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
        delta: the expert's task vector of it.
        alpha: share of the expert's own inputs in those at which its output is the target, in [0, 1].
        patches: weight of all tokens but the first, for each of some groups of the layer's outputs, all of one size.
    """

    def __init__(self, base: Tensor, delta: Tensor, alpha: float, patches: Sequence[float] = (1.0,)) -> None:
        d_out, d_in = delta.shape
        self._base, self._delta, self._alpha, self._patches = base, delta, alpha, patches
        narrow = d_out < d_in  # moments with what the layer makes of the inputs are smaller then than with them
        self._narrow = self._weights() if narrow else None
        self._sums = [_Sums.zero(d_in, d_out // len(patches) if narrow else d_in, delta.device) for _ in patches]
        self._waiting: list[Tensor] = []

    def merged(self, x: Tensor) -> None:
        """Observe the merged model's inputs of some images, ``[images, tokens, d_in]``; the expert's of the same come next."""
        self._waiting.append(x.detach())

    def expert(self, x: Tensor) -> None:
        """Observe the expert's inputs, in the same batches."""
        merged = self._waiting.pop(0)
        rows = merged.double().flatten(0, 1)
        shift = x.double().flatten(0, 1).sub_(rows)
        for at, (sums, patches) in enumerate(zip(self._sums, self._patches, strict=True)):
            w = None if patches == 1 else _token_weights(merged, patches)
            sums.add(rows, shift, shift if self._narrow is None else shift @ self._narrow[at].T, w)

    def fit(self, bias: Tensor | None) -> LinearFit:
        """This task's part, of the task vector of the bias, ``[d_out]``. It takes over the moments: it can be asked for once."""
        W = self._weights() if self._narrow is None else self._narrow
        D = self._delta.double().view_as(W)
        G, cross, mean, shift = (_stack(parts) for parts in zip(*(sums.means() for sums in self._sums), strict=True))
        offset = (D @ mean[:, :, None] + W @ shift[:, :, None])[:, :, 0]
        if bias is not None:
            offset = offset + bias.double().view(len(W), -1)
        target = (cross @ W.mT if self._narrow is None else cross).baddbmm_(G, D.mT)
        norm = torch.linalg.matrix_norm(G)
        weight = torch.where(norm > 0, norm, 1.0).reciprocal()
        column, matrix = weight[:, None], weight[:, None, None]
        return LinearFit(G.mul_(matrix), target.mul_(matrix), column * mean, column * offset, weight)

    def _weights(self) -> Tensor:
        """The expert's weight times ``alpha``, by groups of outputs, ``[groups, d_out / groups, d_in]``."""
        W = (self._base.to(self._delta.device).double() + self._delta.double()).mul_(self._alpha)
        return W.view(len(self._patches), -1, W.shape[1])


class NormInputs:
    """Moments of a layer normalization's normalized inputs in the merged model, batch by batch, in float64.

    Args:
        delta: the expert's task vector of the gain, ``[d]``.
        patches: weight of all tokens but the first.
    """

    def __init__(self, delta: Tensor, patches: float = 1.0) -> None:
        self._delta, self._patches = delta, patches
        self._sums: list[Tensor] = []

    def merged(self, x: Tensor) -> None:
        """Observe inputs, before normalization, ``[images, tokens, d]``."""
        w, z = _token_weights(x, self._patches), F.layer_norm(x.double(), x.shape[-1:], eps=NORM_EPS).flatten(0, 1)
        sums = [w.sum(), (z.square() * w).sum(0), (z * w).sum(0)]
        self._sums = [total.add_(more) for total, more in zip(self._sums, sums, strict=True)] if self._sums else sums

    def fit(self, offset: Tensor | None) -> NormFit:
        """This task's part, of the task vector of the offset, ``[d]``."""
        energy, mean = (total / self._sums[0] for total in self._sums[1:])
        g, o = self._delta.double(), torch.zeros_like(mean) if offset is None else offset.double()
        return NormFit(energy, mean, energy * g + mean * o, mean * g + o, torch.ones_like(energy[0]))


class _Sums(NamedTuple):
    """Weighted sums over the tokens of all batches; float64.

    Attributes:
        weight: of the tokens, ``[]``.
        gram: Gram matrix of the merged model's inputs, ``[d_in, d_in]``.
        cross: of them and, by columns, of shifts to the expert's, or what the expert's weight makes of these.
        mean: of the merged model's inputs, ``[d_in]``.
        shift: of the shifts, ``[d_in]``.
    """

    weight: Tensor
    gram: Tensor
    cross: Tensor
    mean: Tensor
    shift: Tensor

    @classmethod
    def zero(cls, d_in: int, columns: int, device: torch.device) -> "_Sums":
        """Sums over nothing."""
        shapes = ((), (d_in, d_in), (d_in, columns), (d_in,), (d_in,))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, rows: Tensor, shift: Tensor, right: Tensor, w: Tensor | None) -> None:
        """Add the tokens of a batch, ``[tokens, d_in]`` and ``[tokens, columns]``, with weights ``[tokens, 1]`` or all 1."""
        root = None if w is None else w.sqrt()
        weighted = rows if root is None else rows * root
        gram(weighted, self.gram)
        weighted = weighted if root is None else weighted.mul_(root)
        self.cross.addmm_(weighted.T, right)
        self.weight.add_(len(rows) if w is None else w.sum())
        self.mean.add_(weighted.sum(0))
        self.shift.add_(shift.sum(0) if w is None else w[:, 0] @ shift)

    def means(self) -> list[Tensor]:
        """Means instead of the sums, in their place."""
        return [total.div_(self.weight) for total in self[1:]]


def _ridge_solve(G: Tensor, target: Tensor, ridge: float) -> Tensor:
    held = G.clone()
    held.diagonal().add_(ridge)
    return semidefinite_solve(held, target)


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """Tensors side by side, a single one in its own memory."""
    return parts[0][None] if len(parts) == 1 else torch.stack(list(parts))


def _token_weights(x: Tensor, patches: float) -> Tensor:
    """Weight of each token of ``[images, tokens, d]``, float64, ``[images * tokens, 1]``: 1 for the first, else ``patches``."""
    weights = x.new_full((len(x), x.shape[1], 1), patches, dtype=torch.float64)
    weights[:, 0] = 1.0
    return weights.flatten(0, 1)
