"""What the experts have in common, before any merging: energy curves of their shifts and similarity of their task vectors.

Everything is computed layer by layer and task by task, so that no more than a few matrices of one layer are held.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergekit_vision.errors import EvaluationError, InputError
from mergekit_vision.functional.esd import RowGram
from mergekit_vision.functional.linalg import top_svd
from mergekit_vision.merger import LinearInfo, MergeInputs
from mergekit_vision.support.console import logger


class EnergyCurve(NamedTuple):
    """Share of a layer's shift energy that the ``k`` leading directions keep, for ``k`` = 1, 2, …; averaged over tasks.

    The shift of an input ``x`` is ``Δx``; its energy is the sum of squares over all inputs.

    Attributes:
        esd: directions of the essential subspace, ``[min(d_out, d_in)]``, float64: the best there are for these inputs.
        svd: left singular vectors of the task vector ``Δ``, which know no inputs; same shape.
    """

    esd: Tensor
    svd: Tensor


class _ShiftEnergy:
    """Observer of one layer's inputs that gathers the Gram matrix of the shifts, in the basis of left singular vectors of ``Δ``.

    In that basis a shift is ``Σ Vᵀ x``: ``min(d_out, d_in)`` numbers, whichever of both sides of the layer is the larger. The
    energies along the singular vectors are the diagonal of the Gram matrix ``K = Σ Vᵀ XᵀX V Σ``, those along the essential
    directions its eigenvalues.
    """

    def __init__(self, delta: Tensor) -> None:
        svd = top_svd(delta, min(delta.shape))
        self._coordinates = svd.S[:, None] * svd.Vh
        self._size = min(delta.shape)
        self.gram = RowGram()

    def __call__(self, x: Tensor) -> None:
        self.gram(x @ self._coordinates.T)

    def curve(self) -> EnergyCurve | None:
        """The curves of this task; ``None`` where nothing is shifted."""
        gram = self.gram.matrix
        if gram is None or not gram.trace() > 0:
            return None
        along = torch.linalg.eigvalsh(gram).clamp(min=0).flip(0), gram.diagonal()
        shares = [energy.cumsum(0) / energy.sum() for energy in along]
        missing = self._size - len(gram)  # directions in which Δ is null keep what there is
        return EnergyCurve(*(torch.cat([share, share.new_ones(missing)]) for share in shares))


def expert_analysis(inputs: MergeInputs) -> dict[str, Any]:
    """What there is to say of some experts, as plain values.

    Returns:
        ``similarity``: the tasks and the cosines between their task vectors. ``energy``: representative layer -> numbers of
        directions and the shares that both bases keep with them, and how many directions there are to a task when ``d_out`` is
        shared out among all; empty without proxy images.
    """
    similarity = {"tasks": list(inputs.tasks), "cosine": task_similarity(inputs).tolist()}
    try:
        curves = energy_curves(inputs, representative_linears(inputs.linears))
    except EvaluationError:  # of one of several processes: the others go on with the same images
        raise
    except InputError as error:
        logger.info("no energy curves: %s", error)
        curves = {}
    energy, weights = {}, {linear.name: linear.weight for linear in inputs.linears}
    for name, curve in curves.items():
        steps = torch.tensor(sampled(len(curve.esd)))
        shares = {side: values[steps - 1].tolist() for side, values in curve._asdict().items()}
        share_of_task = len(inputs.base[weights[name]]) // len(inputs.tasks)
        energy[name] = {"directions": steps.tolist(), **shares, "per_task": share_of_task}
    return {"similarity": similarity, "energy": energy}


@torch.no_grad()
def energy_curves(inputs: MergeInputs, linears: Sequence[LinearInfo]) -> dict[str, EnergyCurve]:
    """Energy curves of some layers, averaged over the tasks whose expert changed them; each expert runs once on its proxies.

    Args:
        inputs: backbone, experts and proxy images.
        linears: the layers.

    Returns:
        Layer's name -> curves; layers that no expert changed are left out.

    Raises:
        InputError: when a task has no proxy images.
    """
    curves: dict[str, list[EnergyCurve]] = {linear.name: [] for linear in linears}
    for task in inputs.track(inputs.tasks, "energy curves"):
        deltas = {linear.name: inputs.delta(task, linear.weight) for linear in linears}
        shifts = {name: _ShiftEnergy(delta) for name, delta in deltas.items() if delta.any()}
        if shifts:
            inputs.observe(task, shifts)
        for name, shift in shifts.items():
            if (curve := shift.curve()) is not None:
                curves[name].append(curve)
    return {name: _mean(found) for name, found in curves.items() if found}


def _mean(curves: list[EnergyCurve]) -> EnergyCurve:
    esd, svd = (torch.stack(side).mean(0).cpu() for side in zip(*curves, strict=True))
    return EnergyCurve(esd, svd)


@torch.no_grad()
def task_similarity(inputs: MergeInputs) -> Tensor:
    """Cosines between the experts' whole task vectors, ``[T, T]``, float64; 0 with an expert that equals the backbone."""
    size = len(inputs.tasks)
    gram = torch.zeros(size, size, dtype=torch.float64)
    for key in inputs.track(list(inputs.base), "task vectors"):
        deltas = inputs.deltas(key).reshape(size, -1).double()
        gram += (deltas @ deltas.T).cpu()
    norms = gram.diagonal().sqrt()
    norms = torch.where(norms > 0, norms, torch.inf)
    return gram / norms / norms[:, None]


def representative_linears(linears: Sequence[LinearInfo]) -> list[LinearInfo]:
    """The Linear layers of the first, the middle and the last block, in forward order.

    >>> from mergekit_vision.merger import LinearInfo
    >>> from mergekit_vision.merging.analysis import representative_linears
    >>> layers = [LinearInfo(f"{n}.fc", f"{n}.fc.weight", None, "c_fc", n) for n in range(6)]
    >>> [linear.block for linear in representative_linears(layers)]
    [0, 3, 5]
    """
    blocks = list(dict.fromkeys(linear.block for linear in linears))
    chosen = {blocks[0], blocks[len(blocks) // 2], blocks[-1]} if blocks else set()
    return [linear for linear in linears if linear.block in chosen]


def sampled(size: int, points: int = 48) -> list[int]:
    """Numbers of directions at which a curve is written down: from 1 to ``size``, by nearly equal factors.

    >>> from mergekit_vision.merging.analysis import sampled
    >>> sampled(32, 6)
    [1, 2, 4, 8, 16, 32]
    """
    steps = torch.logspace(0, torch.tensor(float(size)).log10().item(), points, dtype=torch.float64)
    return sorted({round(step) for step in steps.tolist()} | {size})
