"""Trim and Breadcrumbs: task vectors of which entries are kept by their magnitude, before another method merges them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.functional.ties import magnitude_threshold
from mergekit_vision.merger import Merged, MergeInputs, Merger, static_base


@dataclass(frozen=True)
class Trim(Merger):
    """Keep the entries of largest magnitude of each task vector, over all its parameters, and merge them by any method.

    The first step of :class:`TIES` by itself, with the same threshold: with :class:`TIES` of ``density`` 1 as the base the two
    make up TIES again. The scaling coefficient is that of the base.

    Args:
        base: merges what is left; the sum of the task vectors where ``None``.
        density: share of each task vector's entries that is kept, in (0, 1]. Published: 0.2 (top 20 %).
    """

    title: ClassVar[str] = "Trimming"
    paper: ClassVar[str] = (
        "Yadav et al., TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023, arXiv:2306.01708"
    )

    base: Merger | None = None
    density: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise InputError(
                f"Trim: density is {self.density}, but must be a share of the entries in (0, 1], such as 0.2 for 20 %"
            )

    def merge(self, inputs: MergeInputs) -> Merged:
        """Find each task's threshold, then merge the base on the entries that reach it."""
        thresholds = inputs.spread(partial(self._threshold, inputs), inputs.tasks, "thresholds")
        trimmed = inputs.view(lambda task, key, delta: delta.masked_fill_(delta.abs() < thresholds[task], 0.0))
        return static_base(trimmed, self.base)

    def _threshold(self, inputs: MergeInputs, task: str) -> float:
        """Magnitude from which one task's entries are kept."""

        def tensors() -> Iterator[tuple[Tensor, Tensor]]:
            return (inputs.pair(task, key) for key in inputs.base)

        entries = sum(value.numel() for value in inputs.base.values())
        try:
            return magnitude_threshold(tensors, self.density, device=inputs.device, entries=entries)
        except ValueError as error:
            for key in inputs.base:
                inputs.delta(task, key)  # names the tensor, where it is the expert's
            problem = f"{error}: that of task {task}, whose expert is finite; look at the backbone's weights"
            raise InputError(f"Trim: {problem}") from error


@dataclass(frozen=True)
class Breadcrumbs(Merger):
    """Leave out the largest and the smallest entries of each task vector's parameters, and merge the rest by any method.

    Source: Davari and Belilovsky, "Model Breadcrumbs" (ECCV 2024). Of the ``n`` entries of a parameter, ``floor(gamma * n)`` of
    the largest magnitude are dropped as outliers, and so many of the smallest that ``floor(density * n)`` are left (at least
    one). Entries as large as the last one that is kept at either end are kept too. The scaling coefficient is that of the base.

    Args:
        base: merges what is left; the sum of the task vectors where ``None``.
        density: share of each parameter's entries that is kept, in (0, 1].
        gamma: share of each parameter's entries that is dropped as too large, 0 or more; with ``density`` at most 1.
    """

    title: ClassVar[str] = "Model Breadcrumbs"
    paper: ClassVar[str] = (
        "Davari and Belilovsky, Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks, ECCV 2024, "
        "arXiv:2312.06795"
    )

    base: Merger | None = None
    density: float = 0.9
    gamma: float = 0.01

    def __post_init__(self) -> None:
        if not (0 < self.density <= 1 and self.gamma >= 0 and self.density + self.gamma <= 1):
            raise InputError(
                f"Breadcrumbs: density is {self.density} and gamma {self.gamma}, but density must be a share of the entries in "
                "(0, 1] and gamma 0 or more, together at most 1"
            )

    def merge(self, inputs: MergeInputs) -> Merged:
        """Merge the base on what is left of the task vectors."""
        return static_base(inputs.view(self._masked), self.base)

    def _masked(self, task: str, key: str, delta: Tensor) -> Tensor:
        magnitudes = delta.abs()
        n = delta.numel()
        kept = max(1, int(self.density * n))
        largest = n - int(self.gamma * n)  # how many are left below the outliers
        low, high = _ranked(magnitudes.flatten(), largest - kept + 1, largest)
        return delta.masked_fill_((magnitudes < low) | (magnitudes > high), 0.0)


def _ranked(values: Tensor, *ranks: int) -> list[Tensor]:
    """The values of some ranks; the smallest has rank 1."""
    if values.is_cuda:  # where to find one occupies a single multiprocessor, and to sort them all the whole device
        ordered = values.sort().values
        return [ordered[rank - 1] for rank in ranks]
    return [values.kthvalue(rank).values for rank in ranks]
