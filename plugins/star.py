"""STAR and EnergyRank: task vectors whose matrices are truncated in rank before another method merges them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.functional.linalg import top_svd
from mergekit_vision.merger import Change, Merged, MergeInputs, Merger, check_options, static_base

Other = Literal["same", "keep"]


@dataclass(frozen=True)
class STAR(Merger):
    """Truncate the task vectors' matrices in rank, restore the sum of their singular values, and merge them by any method.

    Source: Lee et al., "STAR: Spectral Truncation and Rescale for Model Merging" (NAACL 2025). A matrix keeps the fewest
    singular values that make up the share ``eta`` of their sum; they are enlarged until they have that sum. Parameters that
    are no matrices stay as they are. The scaling coefficient is that of the base; published is :class:`Average`.

    Args:
        base: merges what is left; the sum of the task vectors where ``None``.
        eta: share of the sum of the singular values that is kept, in (0, 1]. Published: 0.4.
        other: whether matrices outside of the blocks, ``visual.proj`` and ``visual.positional_embedding``, are truncated like
            the "same" inside (published) or "keep" their rank.
    """

    title: ClassVar[str] = "STAR"
    paper: ClassVar[str] = "Lee et al., STAR: Spectral Truncation and Rescale for Model Merging, NAACL 2025, arXiv:2502.10339"

    base: Merger | None = None
    eta: float = 0.4
    other: Other = "same"

    def __post_init__(self) -> None:
        if not 0 < self.eta <= 1:
            raise InputError(f"STAR: eta is {self.eta}, but must be a share in (0, 1], such as 0.4 for 40 %")
        check_options(self, other=Other)

    def merge(self, inputs: MergeInputs) -> Merged:
        """Merge the base on what is left of the task vectors."""
        return static_base(inputs.view(_on_matrices(inputs, self._truncated, self.other == "keep")), self.base)

    def _truncated(self, delta: Tensor) -> Tensor:
        U, S, Vh = top_svd(delta.double(), min(delta.shape))
        k = _rank(S, self.eta)
        kept = S[:k] * (S.sum() / S[:k].sum())
        return ((U[:, :k] * kept) @ Vh[:k]).to(delta.dtype)


@dataclass(frozen=True)
class EnergyRank(Merger):
    """Truncate the task vectors' matrices to the rank that keeps a share of their energy, and merge them by any method.

    Each matrix of the blocks keeps the fewest singular values whose squares make up the share ``energy`` of the sum of all
    squares: a rank of its own for every layer and task, where methods with a fixed rank give all the same. Other parameters
    stay as they are. The scaling coefficient is that of the base.

    Args:
        base: merges what is left; the sum of the task vectors where ``None``.
        energy: share of the sum of the squared singular values that is kept, in (0, 1].
    """

    title: ClassVar[str] = "Energy-driven ranks"

    base: Merger | None = None
    energy: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise InputError(f"EnergyRank: energy is {self.energy}, but must be a share in (0, 1], such as 0.95 for 95 %")

    def merge(self, inputs: MergeInputs) -> Merged:
        """Merge the base on what is left of the task vectors."""
        return static_base(inputs.view(_on_matrices(inputs, self._truncated, blocks_only=True)), self.base)

    def _truncated(self, delta: Tensor) -> Tensor:
        U, S, Vh = top_svd(delta.double(), min(delta.shape))
        k = _rank(S.square(), self.energy)
        return ((U[:, :k] * S[:k]) @ Vh[:k]).to(delta.dtype)


def _on_matrices(inputs: MergeInputs, function: Callable[[Tensor], Tensor], blocks_only: bool) -> Change:
    """A change of the task vectors' matrices, of all or of those inside of blocks; others, and zero ones, stay."""
    matrices = inputs.matrices(everywhere=not blocks_only)

    def change(task: str, key: str, delta: Tensor) -> Tensor:
        return function(delta) if key in matrices and delta.any() else delta

    return change


def _rank(values: Tensor, share: float) -> int:
    """How many of the ``values``, largest first, make up a share of their sum; at least one."""
    total = values.cumsum(0)
    return min(int((total < share * total[-1]).sum()) + 1, len(values))
