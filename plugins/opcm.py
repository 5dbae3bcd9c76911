"""OPCM: experts that are merged one after the other."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.functional.opcm import unused_part
from mergekit_vision.merger import Merged, MergeInputs, Merger, check_options

Other = Literal["sum", "project"]


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

    def merge(self, inputs: MergeInputs) -> Merged:
        """Add up parameter by parameter, then rescale; one that no expert changed keeps its pre-trained value."""
        matrices, tasks = inputs.matrices(everywhere=self.other == "project"), list(inputs.tasks)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed)
            tasks = [tasks[i] for i in torch.randperm(len(tasks), generator=generator).tolist()]

        def added(key: str) -> tuple[Tensor, list[float]]:
            """Sum of one parameter's task vectors, each projected; and their squared norms before."""
            total = torch.zeros(inputs.base[key].shape, dtype=torch.float64, device=inputs.device)
            squares = []
            for task in tasks:
                delta = inputs.delta(task, key).double()
                squares.append(float(delta.square().sum()))
                total += unused_part(delta, total, self.split) if key in matrices and total.any() else delta
            return total.float(), squares

        found = inputs.spread_changed(added, inputs.base, "merging")
        norms = [sum(squares) ** 0.5 for squares in zip(*(squares for _, squares in found.values()), strict=True)]
        norm = sum(float(total.double().square().sum()) for total, _ in found.values()) ** 0.5
        factor = sum(norms) / len(tasks) / norm if norm else 1.0
        return Merged({key: total * factor for key, (total, _) in found.items()})
