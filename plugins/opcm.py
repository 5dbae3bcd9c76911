"""OPCM: experts that are merged one after the other."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.functional.opcm import unused_part
from mergekit_vision.merger import Former, Merged, MergeInputs, Merger, Revisable, check_options

Other = Literal["sum", "project"]
Sum = tuple[Tensor, list[float]]
Start = Callable[[str], Tensor | float]
_NORMS = {"norms", "size"}


@dataclass(frozen=True)
class OPCM(Merger):
    """Task vectors added one after the other, each without what the sum so far already uses.

    With the SVD ``U diag(σ) Vᵀ`` of the sum so far, the next task vector has coordinates ``Uᵀ Δ V``; their diagonal, and the
    block of the leading directions that hold ``split`` of ``Σσ``, are taken out before it is added. Of the parameters that are no
    matrices all is added. At the end the whole update gets the mean norm of the task vectors.

    Source: Tang et al., "Merging Models on the Fly Without Retraining" (2025), OPCM. Published code rescales after every step and
    takes that back in the next; only the last time counts, so that each parameter can be merged on its own. The norm is that of
    all merged parameters; the scaling coefficient is 1.

    The result depends on the order of the tasks: it is that of the suite, unless there is a ``seed``.

    Args:
        split: share of the sum's singular values whose directions are closed to the next task, in [0, 1]. Published: 0.5.
        other: how the matrices outside of the blocks, ``visual.proj`` and ``visual.positional_embedding``, are added: "sum",
            whole (published), or "project", like those in the blocks.
        seed: of a random order of the tasks. Published code draws an order, without a seed by default.
    """

    title: ClassVar[str] = "OPCM"
    paper: ClassVar[str] = (
        "Tang et al., Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model Merging, "
        "2025, arXiv:2501.09522"
    )

    split: float = 0.5
    other: Other = "sum"
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.split <= 1:
            raise InputError(f"OPCM: split is {self.split}, but must be a share of the singular values in [0, 1], such as 0.5")
        check_options(self, other=Other)
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise InputError(f"OPCM: seed is {self.seed}, but must lie in -2**63 to 2**64 - 1")

    def merge(self, inputs: MergeInputs) -> Merged:
        """Add up parameter by parameter, then rescale; one that no expert changed keeps its pre-trained value."""
        tasks = list(inputs.tasks)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed)
            tasks = [tasks[i] for i in torch.randperm(len(tasks), generator=generator).tolist()]
        sums = inputs.spread_changed(partial(self._added, inputs, tasks, _nothing), inputs.base, "merging")
        norms, size = _norms(sums), _size(sums)
        return _rescaled(sums, sum(norms) / len(tasks), size, sum(norms) if inputs.keep is not None else None)

    @property
    def revisable(self) -> Revisable:
        """By two norms besides the model; not where the order of the tasks is drawn."""
        return "no" if self.seed is not None else "state"

    def revise(self, former: Former, joining: MergeInputs, leaving: MergeInputs) -> Merged:
        """Add the task vectors of the experts that join.

        Of a model that another method merged, neither the sum's norm is known nor the mean one of its experts. They are taken for
        orthogonal to each other and as long as those that join, and the update keeps its norm.
        """
        if leaving.tasks:
            raise InputError("what OPCM adds depends on what was added before, so no expert can leave; merge the others again")
        before, norm = len(former.tasks), _size({key: (value, []) for key, value in former.change.items()})
        if not norm:
            raise InputError("the model is the backbone: nothing of its experts is in it; merge again")
        if known := _NORMS.issubset(former.kept):
            length, size = float(former.kept["norms"]) / before, float(former.kept["size"])
        else:
            sums = joining.spread(
                lambda key: joining.deltas(key).double().square().flatten(1).sum(1).tolist(), joining.base, "norms"
            )
            each = [math.sqrt(sum(squares)) for squares in zip(*sums.values(), strict=True)]
            length = sum(each) / len(each)
            if not length:
                raise InputError("the experts that join are the backbone: there is nothing to add; leave them out")
            size = math.sqrt(before) * length

        def start(key: str) -> Tensor:
            return former.change[key].double() * math.copysign(size / norm, former.scale)

        found = joining.spread(partial(self._added, joining, list(joining.tasks), start), joining.base, "merging")
        total = before * length + sum(_norms(found))
        mean = total / (before + len(joining.tasks)) if known else norm
        return _rescaled(found, mean, _size(found), total if known else None)

    def _added(self, inputs: MergeInputs, tasks: list[str], start: Start, key: str) -> Sum:
        """One parameter's task vectors, each projected, on top of a sum so far; and their squared norms before."""
        spectral = key in inputs.matrices(everywhere=self.other == "project")
        total = torch.zeros(inputs.base[key].shape, dtype=torch.float64, device=inputs.device) + start(key)
        squares = []
        for task in tasks:
            delta = inputs.delta(task, key).double()
            squares.append(float(delta.square().sum()))
            total += unused_part(delta, total, self.split) if spectral and total.any() else delta
        return total.float(), squares


def _nothing(key: str) -> float:
    return 0.0


def _norms(sums: Mapping[str, Sum]) -> list[float]:
    """Norms of whole task vectors."""
    return [math.sqrt(sum(squares)) for squares in zip(*(squares for _, squares in sums.values()), strict=True)]


def _size(sums: Mapping[str, Sum]) -> float:
    """Norm of the sum over all parameters."""
    return math.sqrt(sum(float(total.double().square().sum()) for total, _ in sums.values()))


def _rescaled(sums: Mapping[str, Sum], mean: float, size: float, norms: float | None) -> Merged:
    """The sum at a norm; what is kept of it where the sum of its experts' ``norms`` is given."""
    factor = mean / size if size else 1.0
    found = {"norms": norms, "size": size} if norms is not None else {}
    kept = {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}
    return Merged({key: total * factor for key, (total, _) in sums.items()}, kept=kept)
