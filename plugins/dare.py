"""DARE and DELLA: task vectors whose entries are dropped at random before another method merges them."""

import hashlib
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.merger import Merged, MergeInputs, Merger, check_options, static_base

Rescale = Literal["probability", "norm"]


@dataclass(frozen=True)
class DARE(Merger):
    """Drop entries of the task vectors at random, rescale the rest, and merge the result by any method.

    Source: Yu et al., "Language Models are Super Mario" (ICML 2024). Every entry is dropped with probability ``drop``, those
    that stay are divided by ``1 - drop``: the expected task vector is the original. What is dropped depends on nothing but the
    seed, the task's name and the parameter's key. The scaling coefficient is that of the base.

    Args:
        base: merges what is left; the sum of the task vectors where ``None``.
        drop: probability in [0, 1).
        rescale: whether what stays is divided by ``1 - drop`` (published).
        seed: of the random numbers. Give DARE inside of DARE another one, or both drop the same entries.
    """

    title: ClassVar[str] = "DARE"
    paper: ClassVar[str] = (
        "Yu et al., Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch, ICML 2024, "
        "arXiv:2311.03099"
    )

    base: Merger | None = None
    drop: float = 0.5
    rescale: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise InputError(f"DARE: drop is {self.drop}, but must be a probability in [0, 1), such as 0.5")

    def merge(self, inputs: MergeInputs) -> Merged:
        """Merge the base on what is left of the task vectors."""
        return static_base(inputs.view(self._sparse), self.base)

    def _sparse(self, task: str, key: str, delta: Tensor) -> Tensor:
        sparse = delta.masked_fill_(_uniform(delta, "DARE", self.seed, task, key) < self.drop, 0.0)
        return sparse.div_(1 - self.drop) if self.rescale else sparse


@dataclass(frozen=True)
class DELLA(Merger):
    """Drop entries of the task vectors at random, small ones more often, and merge the result by any method.

    Source: Deep et al., "DELLA-Merging" (2024), its step MAGPRUNE. Within each row of a parameter the entries are ranked by
    magnitude, and the probability to stay rises linearly with the rank, from ``density - epsilon`` to ``density + epsilon``.
    A tensor of more than two dimensions has a row for each of its first; one of a single dimension is one row. The scaling
    coefficient is that of the base; for the published method the base is :class:`TIES` with ``density`` 1.

    Args:
        base: merges what is left; the sum of the task vectors where ``None``.
        density: mean probability to stay.
        epsilon: half of the range of probabilities. They lie above 0, up to 1.
        rescale: "probability" divides each entry by its own probability (published: the expected task vector is the
            original), "norm" brings each tensor back to the sum of magnitudes that it had.
        seed: of the random numbers, as for :class:`DARE`.
    """

    title: ClassVar[str] = "DELLA"
    paper: ClassVar[str] = (
        "Deep et al., DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling, 2024, "
        "arXiv:2406.11617"
    )

    base: Merger | None = None
    density: float = 0.5
    epsilon: float = 0.15
    rescale: Rescale = "probability"
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.epsilon >= 0 and self.density - self.epsilon > 0 and self.density + self.epsilon <= 1):
            raise InputError(
                f"DELLA: density is {self.density} and epsilon {self.epsilon}, but epsilon must be 0 or more, "
                "density - epsilon above 0 and density + epsilon at most 1"
            )
        check_options(self, rescale=Rescale)

    def merge(self, inputs: MergeInputs) -> Merged:
        """Merge the base on what is left of the task vectors."""
        return static_base(inputs.view(self._sparse), self.base)

    def _sparse(self, task: str, key: str, delta: Tensor) -> Tensor:
        stay = self._probabilities(delta.flatten(1) if delta.dim() > 1 else delta.view(1, -1)).view(delta.shape)
        dropped = _uniform(delta, "DELLA", self.seed, task, key) >= stay
        if self.rescale == "probability":
            return delta.masked_fill_(dropped, 0.0).div_(stay)
        before = delta.abs().sum(dtype=torch.float64)
        after = delta.masked_fill_(dropped, 0.0).abs().sum(dtype=torch.float64)
        return delta.mul_(float(before / after)) if after else delta

    def _probabilities(self, rows: Tensor) -> Tensor:
        """Each entry's probability to stay, by its rank in its row; equal entries are ranked by their place."""
        n = rows.shape[1]
        places = torch.linspace(self.density - self.epsilon, self.density + self.epsilon, n).to(rows.device)
        if n == 1:
            places.fill_(self.density)
        return torch.empty_like(rows).scatter_(1, rows.abs().argsort(dim=1, stable=True), places.expand_as(rows))


def _uniform(like: Tensor, method: str, seed: int, task: str, key: str) -> Tensor:
    """Uniform random numbers in [0, 1), the same on every device and in every process, however many were drawn before."""
    digest = hashlib.sha256("\0".join((method, str(seed), task, key)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    return torch.rand(like.shape, generator=generator).to(like.device)
