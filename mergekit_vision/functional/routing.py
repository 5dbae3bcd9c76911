"""Statistics of a router that sends each image to one expert."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mergekit_vision.functional.linalg import pad_rank, top_svd

Pooling = Literal["mean", "deviation", "first", "covariance"]


LEAST_VARIANCE = 1e-6
"""Share of the largest axis's variance below which an axis is none."""


ROUNDING = 1e-12
"""Deviation within tasks, as a share of the features' root mean square, up to which there is none: float64's rounding errors."""


class Axes(NamedTuple):
    """Leading principal axes of a layer's tokens, scaled so that coordinates have variance 1.

    Attributes:
        basis: ``[d, k]``; the coordinates of tokens ``x`` are ``x @ basis - offset``.
        offset: ``[k]``.
    """

    basis: Tensor
    offset: Tensor


def principal_axes(mean: Tensor, second: Tensor, k: int = 32) -> Axes:
    """Axes of tokens with the mean ``mean [d]`` and the second moment ``second [d, d]``, at most ``k``; float64.

    Along an axis on which tokens hardly vary, as along one that layer normalization takes away, coordinates are rounding errors.
    """
    # every process computes these, and all need the same signs: not where each of them finds it faster, but where the tokens are
    variance, vectors = torch.linalg.eigh(second.double() - torch.outer(mean.double(), mean.double()))
    variance, vectors = variance[-k:], vectors[:, -k:]
    kept = variance > LEAST_VARIANCE * variance[-1]
    basis = vectors[:, kept] / variance[kept].sqrt()
    return Axes(basis, mean.double() @ basis)


def pool_tokens(x: Tensor, pooling: Sequence[Pooling] = ("mean",), axes: Axes | None = None) -> Tensor:
    """One feature vector per image, from its tokens.

    Args:
        x: ``[N, L, d]``.
        pooling: what to put side by side: the "mean" over tokens, their standard "deviation", the "first" token (the class's),
            and the tokens' "covariance" in ``axes``, ``k (k + 1) / 2`` numbers, of which the root is taken to make them less
            skewed.
        axes: for the covariance.

    Returns:
        ``[N, f]``.

    Raises:
        ValueError: when the covariance has no axes.

    >>> pool_tokens(torch.tensor([[[1.0, 5.0], [3.0, 5.0]]]), ("mean", "deviation", "first"))
    tensor([[2., 5., 1., 0., 1., 5.]])
    """
    mean = x.mean(1)
    parts = {"mean": mean, "first": x[:, 0]}
    if "deviation" in pooling:  # torch.var is many times slower over this dimension on the CPU
        parts["deviation"] = (x - mean.unsqueeze(1)).square_().mean(1).sqrt()
    if "covariance" in pooling:
        if axes is None:
            raise ValueError("the tokens' covariance is taken along axes; give them")
        parts["covariance"] = _covariance((x @ axes.basis).sub_(axes.offset))
    return torch.cat([parts[part] for part in pooling], dim=-1)


def _covariance(z: Tensor) -> Tensor:
    """Signed roots of the upper triangle of each image's second moment; ``z [N, L, k]`` to ``[N, k (k + 1) / 2]``."""
    row, column = torch.triu_indices(z.shape[2], z.shape[2], device=z.device)
    moment = (z.transpose(1, 2) @ z / z.shape[1])[:, row, column]
    return moment / (moment.abs() + 0.01).sqrt()  # a plain root would blow rounding errors up near 0


class PooledTokens:
    """Observer of a layer's inputs that keeps the features of each image, and passes the input on.

    Args:
        pooling: the features, as for :func:`pool_tokens`.
        axes: as for :func:`pool_tokens`.
        then: gets the input after it.
    """

    def __init__(
        self, pooling: Sequence[Pooling], axes: Axes | None = None, then: Callable[[Tensor], None] | None = None
    ) -> None:
        self._pooling, self._axes, self._then = pooling, axes, then
        self._batches: list[Tensor] = []

    def __call__(self, x: Tensor) -> None:
        """Pool the tokens ``x [N, L, d]``."""
        self._batches.append(pool_tokens(x, self._pooling, self._axes))
        if self._then is not None:
            self._then(x)

    @property
    def features(self) -> Tensor:
        """Those of all images so far, ``[n, f]``."""
        return torch.cat(self._batches)


class TokenMoments:
    """Observer of a layer's inputs that sums up first and second moments of tokens, in float64."""

    def __init__(self) -> None:
        self._first: Tensor | float = 0.0
        self._second: Tensor | float = 0.0
        self._tokens = 0

    def __call__(self, x: Tensor) -> None:
        """Add the tokens ``x [N, L, d]``."""
        rows = x.flatten(0, 1).double()
        self._first, self._second = self._first + rows.sum(0), self._second + rows.T @ rows
        self._tokens += len(rows)

    def axes(self) -> Axes:
        """Their principal axes, float32."""
        assert isinstance(self._first, Tensor)
        assert isinstance(self._second, Tensor)
        basis, offset = principal_axes(self._first / self._tokens, self._second / self._tokens)
        return Axes(basis.float(), offset.float())


class Subspaces(NamedTuple):
    """An affine subspace of features for each task, in which its images lie most nearly.

    Attributes:
        basis: ``[T, k, f]``, orthonormal rows; rows of zeros where a task has fewer directions than another.
        center: ``[T, f]``, the mean of a task's features.
    """

    basis: Tensor
    center: Tensor


def subspaces(features: Sequence[Tensor], k: int) -> Subspaces:
    """The mean and the ``k`` leading principal directions of each task's features; float64.

    Args:
        features: for each task, its images' features, ``[n_t, f]``.
        k: directions at most; a task of ``n_t`` images has ``n_t - 1`` at most, and no more than ``f``.

    >>> subspaces([torch.tensor([[1.0, 0.0], [1.0, 4.0], [1.0, 8.0]])], k=1).center
    tensor([[1., 4.]], dtype=torch.float64)
    """
    groups = [group.double() for group in features]
    center = torch.stack([group.mean(0) for group in groups])
    found = [top_svd(group - mean, k).Vh for group, mean in zip(groups, center, strict=True)]
    rank = max(1, *map(len, found))
    return Subspaces(torch.stack([pad_rank(basis, rank, 0) for basis in found]), center)


class Discriminant(NamedTuple):
    """A linear discriminant and what it says of the images it was made of.

    Attributes:
        weight: ``[T, f]``, float64; ``weight @ x + bias`` are the log-posteriors of ``x`` up to a constant.
        bias: ``[T]``, float64.
        left_out: ``[n, T]``, float64: the log-posteriors of each image, up to a constant, had it been left out of its task's mean
            and of the covariance. Only of tasks with two images or more.
        labels: ``[n]``, the task of each.
    """

    weight: Tensor
    bias: Tensor
    left_out: Tensor
    labels: Tensor


def discriminant(features: Sequence[Tensor], shrinkage: float) -> Discriminant:
    """Linear discriminant between tasks of equal probability that share one covariance.

    The covariance within tasks, ``S``, is pooled over tasks and shrunk towards its own diagonal, ``(1 - shrinkage) S +
    shrinkage diag(S)``: a few images a task are far fewer than the features. Where features do not vary within any task, as with
    one image each, the variances of the tasks' means stand for ``diag(S)``.

    Args:
        features: for each task, its images' features, ``[n_t, f]``.
        shrinkage: between 0 (excluded) and 1.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> a, b = torch.randn(2, 50, 3, generator=generator)
        >>> fit = discriminant([a, b + torch.tensor([4.0, 0.0, 0.0])], shrinkage=0.5)
        >>> (fit.weight @ torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64) + fit.bias).argmax().item()
        1
    """
    groups = [group.double() for group in features]
    means = torch.stack([group.mean(0) for group in groups])
    rest = torch.cat([group - mean for group, mean in zip(groups, means, strict=True)])
    freedom = max(len(rest) - len(groups), 1)
    variance = rest.square().sum(0) / freedom
    if variance.mean() <= ROUNDING**2 * means.square().mean():  # one image a task, or the same one several times
        variance = (means - means.mean(0)).square().sum(0) / max(len(means) - 1, 1)
    deviation = variance.clamp_min(1e-8 * variance.mean().clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    # In units of the deviations the shrunk covariance is A = shrinkage * I + (1 - shrinkage) / freedom * CᵀC.
    C, M = rest / deviation, (means - means.mean(0)) / deviation
    ratio = (1 - shrinkage) / (freedom * shrinkage)
    scaled, own = (_by_features if len(C) > C.shape[1] else _by_images)(C, M, shrinkage, ratio)
    weight = scaled / deviation
    bias = -0.5 * (scaled * M).sum(1) - weight @ means.mean(0)
    left_out = _left_out(own, C @ scaled.T, M @ scaled.T, [len(group) for group in groups], ratio * shrinkage)
    return Discriminant(weight, bias, *left_out)


def _by_features(C: Tensor, M: Tensor, shrinkage: float, ratio: float) -> tuple[Tensor, Tensor]:
    """``M A⁻¹ [T, f]`` and the diagonal of ``C A⁻¹ Cᵀ [n]`` with ``A = shrinkage * (I + ratio * CᵀC)``, ``[f, f]``."""
    A = shrinkage * (torch.eye(C.shape[1], dtype=C.dtype, device=C.device) + ratio * (C.T @ C))
    solved = torch.linalg.solve(A, torch.cat([M, C]).T).T
    return solved[: len(M)], (solved[len(M) :] * C).sum(1)


def _by_images(C: Tensor, M: Tensor, shrinkage: float, ratio: float) -> tuple[Tensor, Tensor]:
    """The same from ``[n, n]`` matrices, without forming ``A`` (Woodbury's identity)."""
    K = C @ C.T
    inner = torch.eye(len(C), dtype=C.dtype, device=C.device) + ratio * K
    solved = torch.linalg.solve(inner, torch.cat([C @ M.T, K], 1)) / shrinkage
    return M / shrinkage - ratio * (solved[:, : len(M)].T @ C), solved[:, len(M) :].diagonal()


def _left_out(own: Tensor, cross: Tensor, means: Tensor, sizes: Sequence[int], step: float) -> tuple[Tensor, Tensor]:
    """Scores of each image without itself, by the rank-one change that this makes to mean and covariance.

    Without image ``i``, ``r`` away from the mean of its task of ``n`` images, the covariance is ``A - step n / (n - 1) r rᵀ``
    (the units and the divisor stay), and ``i`` is ``n / (n - 1) r`` away from the mean; inverted by Sherman and Morrison.

    Args:
        own: products under ``A⁻¹`` of each image's deviation from its mean with itself, ``[n]``.
        cross: of these deviations with the means, ``[n, T]``.
        means: of the means, ``[T, T]``.
        sizes: images a task.
        step: what an image's outer product weighs in ``A``.
    """
    counts = torch.tensor(sizes, device=own.device)
    labels = torch.arange(len(sizes), device=own.device).repeat_interleave(counts)
    grow = (counts.to(own.dtype) / (counts - 1).clamp_min(1))[labels]
    true = torch.nn.functional.one_hot(labels, len(sizes)).bool()
    # x - m_s = r + (m_t - m_s), its products with itself and with r under A⁻¹
    along = own[:, None] + cross.gather(1, labels[:, None]) - cross
    length = along + cross.gather(1, labels[:, None]) - cross
    length = length + means.diagonal()[labels, None] + means.diagonal() - 2 * means[labels]
    along = torch.where(true, (grow * own)[:, None], along)
    length = torch.where(true, (grow.square() * own)[:, None], length)
    removed = step * grow
    left = (1 - removed * own).clamp_min(torch.finfo(own.dtype).eps)
    scores = -0.5 * (length + (removed / left)[:, None] * along.square())
    known = counts[labels] > 1
    return scores[known], labels[known]


def calibrate(scores: Tensor, labels: Tensor, most: float = 1e4) -> float:
    """The temperature at which the softmax of ``scores / temperature`` makes ``labels`` most probable.

    Args:
        scores: ``[n, T]``, of images that had no part in them, such as :attr:`Discriminant.left_out`.
        labels: ``[n]``, int64.
        most: largest temperature. The least is 1: posteriors may be softened, not sharpened.

    Returns:
        The temperature; 1 for no images.

    >>> scores = torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0], [0.0, 3.0]])  # sure, and wrong once in four
    >>> round(calibrate(scores, torch.zeros(4, dtype=torch.int64)), 2)  # 3 / log(3)
    2.73
    """
    if not len(scores):
        return 1.0
    true = scores.gather(1, labels[:, None]).squeeze(1)
    low, high = 0.0, math.log(most)
    for _ in range(60):  # the likelihood is concave in 1 / temperature
        middle = (low + high) / 2
        expected = ((scores / math.exp(middle)).softmax(1) * scores).sum(1)
        low, high = (middle, high) if (expected - true).mean() > 0 else (low, middle)
    return math.exp(low)
