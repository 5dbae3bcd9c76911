"""Routers: which experts of a routed layer an image, or each of its tokens, goes through."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mergekit_vision.functional.linalg import pad_rank
from mergekit_vision.functional.routing import Axes, Pooling, pool_tokens

Plain = bool | int | float | str | list[str]


class Choice(NamedTuple):
    """Chosen experts with their weights, one row per image (``L' = 1``) or one per token (``L' = L``).

    Attributes:
        experts: their indices, ``[N, L', K]``, int64.
        weight: ``[N, L', K]``, adding up to 1 over the ``K`` experts, up to rounding.
    """

    experts: Tensor
    weight: Tensor

    def dense(self, total: int) -> Tensor:
        """The weights of all ``total`` experts, zero where not chosen: ``[N, L', total]``."""
        out = self.weight.new_zeros(*self.experts.shape[:-1], total)
        return out.scatter(-1, self.experts, self.weight)


class Router(nn.Module, ABC):
    """Scores the experts of one layer; the ``top_k`` best are mixed by the softmax of their scores over ``temperature``.

    A subclass implements :meth:`forward`. So that a router can be saved, its constructor takes each registered buffer by the
    buffer's name and each item of :meth:`arguments` by its key, and changes neither.

    Args:
        top_k: how many experts are mixed; one expert has weight exactly 1.
        temperature: divides the scores before the softmax.

    Example:
        A third router, by the brightest token:

        >>> class Peak(Router):
        ...     def __init__(self, directions: Tensor) -> None:
        ...         super().__init__()
        ...         self.register_buffer("directions", directions)
        ...     def forward(self, x: Tensor) -> Tensor:
        ...         return (x @ self.directions.T).amax(1, keepdim=True)
        >>> router = Peak(torch.eye(3))
        >>> router.choose(router(torch.tensor([[[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]]))).experts.tolist()
        [[[1]]]
    """

    def __init__(self, top_k: int = 1, temperature: float = 1.0) -> None:
        super().__init__()
        self.top_k, self.temperature = top_k, temperature

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Score the experts.

        Args:
            x: the layer's input, ``[N, L, d_in]``. The scores of an image may depend on that image only.

        Returns:
            ``[N, 1, T]`` to route each image as a whole, ``[N, L, T]`` to route each token. Scores that are logarithms of
            probabilities, up to a constant, can be added over layers.
        """

    def choose(self, scores: Tensor) -> Choice:
        """The best experts by ``scores [N, L', T]``; weights below the spacing of numbers at 1 are exactly 0.

        Such an expert changes the output by less than rounding does. Of posteriors that are sure, weights may even be denormal
        numbers, with which processors multiply many times more slowly.
        """
        if self.top_k == 1:  # several times faster than topk on the CPU
            only = scores.max(-1, keepdim=True)
            return Choice(only.indices, torch.ones_like(only.values))
        best = scores.topk(min(self.top_k, scores.shape[-1]), dim=-1)
        weight = (best.values / self.temperature).softmax(-1)
        return Choice(best.indices, weight.masked_fill(weight < torch.finfo(weight.dtype).eps, 0))

    def arguments(self) -> Mapping[str, Plain]:
        """Constructor arguments that are not buffers."""
        return {"top_k": self.top_k, "temperature": self.temperature}


class CosineRouter(Router):
    """Sends an image to the prototype nearest to its mean token, by cosine (ESM++, arXiv 2606.19164).

    Args:
        prototypes: ``[T, d_in]``, of any length.
        center: ``[d_in]``, subtracted from the mean token and from the prototypes first.
        top_k: how many experts are mixed.
        temperature: divides the scores before the softmax.
    """

    prototypes: Tensor
    center: Tensor | None

    def __init__(self, prototypes: Tensor, center: Tensor | None = None, top_k: int = 1, temperature: float = 1.0) -> None:
        super().__init__(top_k, temperature)
        self.register_buffer("prototypes", prototypes)
        self.register_buffer("center", center)

    def forward(self, x: Tensor) -> Tensor:
        """Cosines between mean token and prototypes, ``[N, 1, T]``."""
        pooled, prototypes = x.mean(1), self.prototypes
        if self.center is not None:
            pooled, prototypes = pooled - self.center, prototypes - self.center
        return (F.normalize(pooled, dim=-1) @ F.normalize(prototypes, dim=-1).T).unsqueeze(1)


class LinearRouter(Router):
    """Scores an image by a linear function of its pooled tokens, such as the log-posteriors of a linear discriminant.

    Args:
        weight: ``[T, features]``; :func:`~mergekit_vision.functional.routing.discriminant` estimates one.
        bias: ``[T]``.
        pooling: the features, as for :func:`~mergekit_vision.functional.routing.pool_tokens`.
        basis: ``[d_in, k]``, of the axes of the tokens' covariance, where that is among the features.
        offset: ``[k]``, of the same axes.
        top_k: how many experts are mixed.
        temperature: divides the scores before the softmax.
    """

    weight: Tensor
    bias: Tensor
    basis: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        pooling: Sequence[Pooling] = ("mean",),
        basis: Tensor | None = None,
        offset: Tensor | None = None,
        top_k: int = 1,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(top_k, temperature)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("basis", basis)
        self.register_buffer("offset", offset)
        self.pooling = tuple(pooling)

    def forward(self, x: Tensor) -> Tensor:
        """Log-posteriors up to a constant, ``[N, 1, T]``."""
        axes = None if self.basis is None or self.offset is None else Axes(self.basis, self.offset)
        return F.linear(pool_tokens(x, self.pooling, axes), self.weight, self.bias).unsqueeze(1)

    def arguments(self) -> Mapping[str, Plain]:
        """Constructor arguments that are not buffers."""
        return {"pooling": list(self.pooling), **super().arguments()}


class ProjectionRouter(Router):
    """Scores each token by the norm of its projection onto each expert's subspace (SMILE, arXiv 2408.10174).

    Args:
        basis: ``[T, g, d_in]``, an orthonormal basis of each expert's subspace.
        top_k: how many experts are mixed.
        temperature: divides the scores before the softmax.
    """

    basis: Tensor

    def __init__(self, basis: Tensor, top_k: int = 1, temperature: float = 1.0) -> None:
        super().__init__(top_k, temperature)
        self.register_buffer("basis", basis)

    def forward(self, x: Tensor) -> Tensor:
        """Norms of the projections, ``[N, L, T]``."""
        parts = F.linear(x, self.basis.flatten(0, 1)).view(*x.shape[:-1], *self.basis.shape[:2])
        norms: Tensor = torch.linalg.vector_norm(parts, dim=-1)
        return norms


class SubspaceRouter(Router):
    """Sends an image to the expert whose subspace lies nearest to its features (MASS, arXiv 2504.05342; SiM, 2606.22589).

    An expert's score is the distance of the features from its subspace, negated and standardized over the experts, so that scores
    of different layers are comparable and a temperature of 1 fits all of them.

    Args:
        basis: ``[T, k, f]``, an orthonormal basis of each expert's subspace; rows of zeros count for nothing.
        center: ``[T, f]``, a point of each subspace; the origin where ``None``.
        pooling: the ``f`` features, as for :func:`~mergekit_vision.functional.routing.pool_tokens`; not "covariance".
        top_k: how many experts are mixed.
        temperature: divides the scores before the softmax.
    """

    basis: Tensor
    center: Tensor | None

    def __init__(
        self,
        basis: Tensor,
        center: Tensor | None = None,
        pooling: Sequence[Pooling] = ("first",),
        top_k: int = 1,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(top_k, temperature)
        self.register_buffer("basis", basis)
        self.register_buffer("center", center)
        self.pooling = tuple(pooling)

    def forward(self, x: Tensor) -> Tensor:
        """Standardized distances, negated, ``[N, 1, T]``."""
        features = pool_tokens(x, self.pooling).unsqueeze(1)
        rest = features.expand(-1, len(self.basis), -1) if self.center is None else features - self.center
        rest = rest - torch.einsum("ntk,tkf->ntf", torch.einsum("ntf,tkf->ntk", rest, self.basis), self.basis)
        distance = torch.linalg.vector_norm(rest, dim=-1)
        scores = distance.amin(-1, keepdim=True) - distance  # exactly 0 for all that are alike, so that none is divided by 0
        spread = scores.std(-1, correction=0, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
        standardized: Tensor = (scores - scores.mean(-1, keepdim=True)) / spread
        return standardized.unsqueeze(1)

    def arguments(self) -> Mapping[str, Plain]:
        """Constructor arguments that are not buffers."""
        return {"pooling": list(self.pooling), **super().arguments()}


class HeldRouter(Router):
    """Of a layer that decides by the scores of others: it has none of its own, and mixes the experts as told.

    Args:
        experts: how many there are.
        top_k: how many experts are mixed.
        temperature: divides the others' scores before the softmax.
    """

    def __init__(self, experts: int, top_k: int = 1, temperature: float = 1.0) -> None:
        super().__init__(top_k, temperature)
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        """Zeros, ``[N, 1, T]``."""
        return x.new_zeros(len(x), 1, self.experts)

    def arguments(self) -> Mapping[str, Plain]:
        """Constructor arguments that are not buffers."""
        return {"experts": self.experts, **super().arguments()}


Evidence = Literal["own", "start", "add", "hold", "ahead"]

ExpertDtype = Literal["float32", "bfloat16"]
"""What the factors of routed experts are rounded to and stored in."""


@dataclass(frozen=True)
class LowRankExperts:
    """Low-rank experts of one Linear layer: expert ``t`` adds ``up[t] @ down[t] @ x + bias[t]`` to the layer's output.

    An expert of lower rank than others has zeros at the end of its factors. They are held, so that the experts of many images can
    be gathered and multiplied at once, and not stored.

    Attributes:
        up: ``[T, d_out, r]``.
        down: ``[T, r, d_in]``.
        router: scores the experts.
        bias: ``[T, d_out]``, or ``None``.
        evidence: what the scores mean to a decision that layers take together, in forward order: ``"own"`` decides by the
            layer's own scores and leaves the shared ones alone; ``"start"`` makes its own the shared ones; ``"add"`` adds its
            own to the shared ones and decides by the sum; ``"hold"`` decides by the shared ones as they are; ``"ahead"`` does so
            too, and the shared ones are the sum of the scores that all such layers give in a run of the base ahead of the
            model's, so that layers before them can hold the decision as well. Of scores of tokens, the mean counts there.

    Raises:
        ValueError: when the shapes do not fit each other.
    """

    up: Tensor
    down: Tensor
    router: Router
    bias: Tensor | None = None
    evidence: Evidence = "own"

    def __post_init__(self) -> None:
        shapes = {"up": tuple(self.up.shape), "down": tuple(self.down.shape)}
        if self.up.dim() != 3 or self.down.dim() != 3 or (shapes["up"][0], shapes["up"][2]) != shapes["down"][:2]:
            raise ValueError(f"up [T, d_out, r] and down [T, r, d_in] do not fit each other: {shapes}")
        if self.bias is not None and tuple(self.bias.shape) != shapes["up"][:2]:
            raise ValueError(f"bias must be [T, d_out] = {list(shapes['up'][:2])}, got {list(self.bias.shape)}")

    def check_router(self) -> None:
        """Have a copy of the router score an image of two tokens, in float32.

        Raises:
            ValueError: when it does not run on the layer's inputs, or does not score as many experts as there are.
        """
        (count, _, width), device = self.down.shape, self.down.device
        try:
            router = deepcopy(self.router).to(device, torch.float32).eval()  # as a layer takes it over
            with torch.no_grad():
                shape = list(router(torch.zeros(1, 2, width, device=device)).shape)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise ValueError(f"its router does not run on the layer's inputs: {error}") from error
        if shape not in ([1, 1, count], [1, 2, count]):
            raise ValueError(f"its router gives scores {shape} for the {count} experts of the layer")

    def rounded(self, dtype: ExpertDtype) -> "LowRankExperts":
        """The same experts with factors in ``dtype``, each number rounded to the nearest; router and bias stay as they are.

        >>> up, down = torch.full((2, 3, 1), 1.001), torch.ones(2, 1, 4)
        >>> rounded = LowRankExperts(up, down, HeldRouter(2)).rounded("bfloat16")
        >>> rounded.up.dtype, rounded.up.max().item(), rounded.up.nbytes
        (torch.bfloat16, 1.0, 12)
        """
        kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
        return replace(self, up=self.up.to(kind), down=self.down.to(kind))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors there are, by ``up``, ``down``, ``bias`` and ``router.<buffer>``."""
        parts = {"up": self.up, "down": self.down, "bias": self.bias}
        parts |= {f"router.{key}": buffer for key, buffer in self.router.named_buffers()}
        return {key: part for key, part in parts.items() if part is not None}

    @property
    def ranks(self) -> list[int]:
        """How many directions each expert has, without zeros at its end; at least one."""
        used = self.up.ne(0).any(1) | self.down.ne(0).any(2)
        places = torch.arange(1, used.shape[1] + 1, device=used.device)
        ranks: list[int] = (used * places).amax(1).clamp(min=1).tolist()
        return ranks

    def stored(self) -> tuple[dict[str, Tensor], list[int] | None]:
        """The tensors as they are stored, and the ranks where they differ: then ``up`` is ``[d_out, Σ r]``, ``down [Σ r, d_in]``.

        >>> up = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 0.0], [6.0, 0.0]]])
        >>> down = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [0.0, 0.0]]])
        >>> tensors, ranks = LowRankExperts(up, down, HeldRouter(2)).stored()
        >>> ranks, tensors["up"].tolist()
        ([2, 1], [[1.0, 2.0, 5.0], [3.0, 4.0, 6.0]])
        """
        tensors, ranks, r = self.tensors(), self.ranks, self.up.shape[2]
        if not min(ranks) < max(ranks) == r <= min(self.up.shape[1], self.down.shape[2]):
            return tensors, None
        up = torch.cat([part[:, :k] for part, k in zip(self.up, ranks, strict=True)], 1)
        down = torch.cat([part[:k] for part, k in zip(self.down, ranks, strict=True)])
        return {**tensors, "up": up, "down": down}, ranks

    @staticmethod
    def padded(up: Tensor, down: Tensor, ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Factors as they are stored with ``ranks``, back in the form ``[T, d_out, r]`` and ``[T, r, d_in]``.

        Raises:
            ValueError: when they do not fit each other.
        """
        shapes = {"up": tuple(up.shape), "down": tuple(down.shape)}
        fit = up.dim() == down.dim() == 2 and up.shape[1] == len(down) == sum(ranks)
        if not (fit and ranks and all(1 <= k <= min(len(up), down.shape[1]) for k in ranks)):
            raise ValueError(f"up [d_out, r] and down [r, d_in] do not fit the experts' ranks: {shapes}")
        r = max(ranks)
        return (
            torch.stack([pad_rank(part, r, 1) for part in torch.split(up, list(ranks), dim=1)]),
            torch.stack([pad_rank(part, r, 0) for part in torch.split(down, list(ranks))]),
        )
