"""Calibration of a merged model, weighted by what its outputs depend on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.functional import fisher
from mergekit_vision.functional.fisher import Curvature, CurvatureMoments, fisher_fit
from mergekit_vision.merger import DataNeeds, LinearInfo, Merged, MergeInputs, Merger, settled, static_base


@dataclass(frozen=True)
class FisherFit(Merger):
    """Fits the layers of a merged model to the experts on proxy images, where class probabilities depend on them.

    The weights of the blocks' Linear layers solve ``Σ_t H_t (W - W_t) G_t + ridge (W - A) = 0``, from runs of the proxy images
    through the anchor ``A`` and back: ``G_t`` is the second moment of a layer's inputs, ``H_t`` that of the gradient, by
    its outputs, of the divergence of the anchor's class probabilities from the expert's. All else is the base's. With the
    experts' own Fisher matrices and no anchor it is Tam et al.'s method. No coefficient scales the result; the base is taken at
    the one that is set or searched.

    Args:
        base: merges what is fitted; ESM with its defaults where ``None``.
        rho: the anchor's weights of these layers are the backbone's plus ``rho`` times the base's update.
        ridge: pull of the anchor, above 0; each task's ``G_t`` has norm 1 and ``H_t`` a mean diagonal entry of 1.
        floor: share to which all outputs count equally, in [0, 1]; with 1 no gradient has a say.
    """

    title: ClassVar[str] = "Fisher-weighted fit"
    paper: ClassVar[str] = "after Tam et al., Merging by Matching Models in Task Parameter Subspaces, TMLR 2024, arXiv:2312.04339"
    needs: ClassVar[DataNeeds] = "proxies"

    base: Merger | None = None
    rho: float = 1.4
    ridge: float = 1.0
    floor: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.rho < math.inf:
            raise InputError(f"FisherFit: rho is {self.rho}, but must be a finite number, 0 or more")
        if not 0 < self.ridge < math.inf:
            raise InputError(f"FisherFit: ridge is {self.ridge}, but must be a finite number above 0")
        if not 0 <= self.floor <= 1:
            raise InputError(f"FisherFit: floor is {self.floor}, but must be in [0, 1]")

    def merge(self, inputs: MergeInputs) -> Merged:
        """Merge the base, see how its outputs depend on every layer, then fit the layers."""
        from .esm import ESM  # here, as only the default depends on another plugin

        base = settled(inputs, static_base(inputs, ESM() if self.base is None else self.base))
        fits = {linear.weight for linear in inputs.linears}
        update = {key: self.rho * value if key in fits else value for key, value in base.update.items()}
        anchor = Merged(update, fixed=frozenset(update))
        found: dict[str, Tensor] = {}
        for number, linears in enumerate(groups := _groups(inputs)):
            found |= self._fit(inputs, anchor, linears, f"part {number + 1} of {len(groups)}")
        return Merged(update | found, base.scale, fixed=frozenset(update | found))

    def _fit(self, inputs: MergeInputs, anchor: Merged, linears: Sequence[LinearInfo], name: str) -> dict[str, Tensor]:
        """The task vectors of some layers' weights."""

        def curvatures(task: str) -> dict[str, Curvature]:
            moments = {linear.name: CurvatureMoments() for linear in linears}
            inputs.differentiate(task, moments, anchor)
            return {linear.weight: moments.pop(linear.name).curvature(self.floor) for linear in linears}

        def fitted(key: str) -> Tensor:
            deltas = [inputs.delta(task, key) for task in inputs.tasks]
            start = anchor.update[key] if key in anchor.update else deltas[0].new_zeros(deltas[0].shape)
            return fisher_fit(deltas, [seen[task][key] for task in inputs.tasks], start, self.ridge).float()

        seen = inputs.spread(curvatures, inputs.tasks, f"proxies and gradients, {name}")
        return inputs.spread(fitted, [linear.weight for linear in linears], f"fitting, {name}")


def _groups(inputs: MergeInputs) -> list[list[LinearInfo]]:
    """The layers that some expert changed, in parts whose curvatures are held at once."""
    changed = inputs.spread_changed(lambda key: True, [linear.weight for linear in inputs.linears], "layers that changed")
    groups, held = list[list[LinearInfo]](), math.inf
    for linear in (linear for linear in inputs.linears if linear.weight in changed):
        size = 4 * len(inputs.tasks) * sum(side * (side + 1) for side in inputs.base[linear.weight].shape)
        if held + size > fisher.HELD:
            groups.append([])
            held = 0
        groups[-1].append(linear)
        held += size
    return groups
