"""Merging methods as the published scripts compute them: everything in memory, a full SVD wherever a formula names one.

The yardstick of :mod:`benchmarks.merging`. Written from the formulas (ESM in the form of the authors' code, CVPR 2026; TSV-M,
CVPR 2025; TIES, NeurIPS 2023; Iso-C, ICML 2025), in float32 as published, or in float64 for an exact reference. It leaves out
what makes the published code slower than its formulas: frozen text-tower tensors are not decomposed, no basis is padded to a
square, TIES' thresholds are found one task at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.meter import Stopwatch

State = dict[str, Tensor]

DENSITY_PERCENT = 20  # TIES
GAIN, EIGENVALUE_POWER, POWER = 2.0, 0.15, 2.0  # ESM
INPUTS_OF = {"in_proj": "attn", "c_fc": "mlp.c_fc", "c_proj": "mlp.c_proj"}  # matrix -> module whose input it multiplies


def load(path: Path) -> State:
    """A state dict in memory of its own, as ``torch.load`` gives it."""
    return {key: value.clone() for key, value in load_file(path).items()}


@dataclass
class Textbook:
    """One merge; all experts are held, and all task vectors beside them.

    Attributes:
        base: backbone.
        experts: one state dict a task.
        device: where matrices are decomposed.
        dtype: of all arithmetic.
    """

    base: State
    experts: list[State]
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.base = {key: value.to(self.dtype) for key, value in self.base.items()}

    @cached_property
    def vectors(self) -> list[State]:
        """Task vectors."""
        return [{key: expert[key].to(self.dtype) - base for key, base in self.base.items()} for expert in self.experts]

    def ties(self) -> State:
        """TIES with the published trimming (top 20 %) and disjoint mean."""
        base = flat(self.base, self.base)
        merged, start = ties([(flat(expert, self.base) - base).to(self.device) for expert in self.experts]).cpu(), 0
        result = {}
        for key, value in self.base.items():
            result[key] = value + merged[start : start + value.numel()].view_as(value)
            start += value.numel()
        return result

    def tsvm(self) -> State:
        """TSV-M of all matrices, the mean of the rest."""
        return self._added({key: self._merged(key, tsvm) for key in self.base})

    def iso_c(self) -> State:
        """Iso-C of all matrices, the mean of the rest."""
        return self._added({key: self._merged(key, iso_c) for key in self.base})

    def esm(self, visual: Any, images: Sequence[Tensor], forward: Stopwatch) -> State:
        """ESM: all decompositions first, kept, then all merging.

        Args:
            visual: plain open_clip tower that runs the experts.
            images: proxy images of every task.
            forward: counts the time of the forward passes, without the decompositions made on the way.
        """
        spectra = [self.spectra(visual, task, batch, forward) for task, batch in enumerate(images)]
        update = {}
        for key in self.base:
            essential = [spectrum[key] for spectrum in spectra if key in spectrum]
            update[key] = self._merged(key, partial(esm, spectra=essential) if essential else tsvm)
        for kind in ("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight"):
            keys = [key for key in update if key.endswith(kind)]
            mean = sum(float(update[key].norm()) for key in keys) / len(keys)
            for key in keys:
                update[key] *= (float(update[key].norm()) / mean) ** POWER
        return self._added(update)

    def spectra(self, visual: Any, task: int, images: Tensor, forward: Stopwatch) -> dict[str, tuple[Tensor, Tensor]]:
        """Eigenvalues and directions of the activation shift of every matrix, decomposed as its input comes by."""
        expert = self.experts[task].items()
        weights = {key.removeprefix("visual."): value.to(self.device, self.dtype) for key, value in expert}
        visual.load_state_dict(weights, assign=True)
        found: dict[str, tuple[Tensor, Tensor]] = {}

        def decompose(key: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                with forward.paused():
                    delta = self.vectors[task][key].to(self.device)
                    values, vectors = essential_directions(args[0].flatten(0, 1) @ delta.T)
                    found[key] = values.cpu(), vectors.cpu()

            return hook

        handles = []
        for n, block in enumerate(visual.transformer.resblocks):
            for kind, module in INPUTS_OF.items():
                key = f"visual.transformer.resblocks.{n}.{module}.{'in_proj_' if kind == 'in_proj' else ''}weight"
                handles.append(block.get_submodule(module).register_forward_pre_hook(decompose(key)))
        with forward.running():
            visual(images.to(self.device, self.dtype))
        for handle in handles:
            handle.remove()
        return found

    def _merged(self, key: str, spectral: Callable[[list[Tensor]], Tensor]) -> Tensor:
        deltas = [vector[key] for vector in self.vectors]
        if self.base[key].dim() != 2:
            return reduce(torch.add, deltas) / len(deltas)
        return spectral([delta.to(self.device) for delta in deltas]).cpu()

    def _added(self, update: State) -> State:
        return {key: value + update[key] for key, value in self.base.items()}


def flat(state: State, like: State) -> Tensor:
    """All parameters of a state dict in one vector, in the order and dtype of another."""
    return torch.cat([state[key].to(value.dtype).flatten() for key, value in like.items()])


def ties(vectors: list[Tensor]) -> Tensor:
    """Trim, elect signs, average what agrees."""
    entries = len(vectors[0])
    rank = entries - entries * DENSITY_PERCENT // 100
    trimmed = torch.stack([vector * (vector.abs() >= vector.abs().kthvalue(rank).values) for vector in vectors])
    sign = trimmed.sum(0).sign()
    sign[sign == 0] = sign.sum().sign()
    agreeing = torch.where(sign > 0, trimmed > 0, trimmed < 0)
    return (trimmed * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


def polar(M: Tensor) -> tuple[Tensor, float]:
    """Polar factor ``U Vᵀ``, and the mean of the thin singular values."""
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return U @ Vh, float(S.mean())


def tsvm(deltas: list[Tensor]) -> Tensor:
    """TSV-M of one matrix."""
    k = min(deltas[0].shape) // len(deltas)
    triplets = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    U = torch.cat([U[:, :k] for U, _, _ in triplets], 1)
    S = torch.cat([S[:k] for _, S, _ in triplets])
    Vh = torch.cat([Vh[:k] for _, _, Vh in triplets])
    return polar(U)[0] @ torch.diag(S) @ polar(Vh)[0]


def iso_c(deltas: list[Tensor]) -> Tensor:
    """Iso-C of one matrix: the sum with all its singular values set to their mean."""
    factor, mean = polar(reduce(torch.add, deltas))
    return mean * factor


def essential_directions(shift: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of the second moment of an activation shift ``[n, d_out]``, and its eigenvectors as columns."""
    _, S, Vh = torch.linalg.svd(shift, full_matrices=False)
    return S.square() / (len(shift) - 1), Vh.T


def esm(deltas: list[Tensor], spectra: list[tuple[Tensor, Tensor]]) -> Tensor:
    """ESM of one matrix, up to the inter-layer scaling."""
    E, C = side_by_side(deltas, spectra)
    (left, left_mean), (right, right_mean) = polar(E), polar(C)
    return GAIN * left_mean * right_mean * left @ right


def side_by_side(deltas: list[Tensor], spectra: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """What ESM makes orthogonal: all tasks' weighted directions as columns, and their scaled coordinates as rows."""
    k = len(deltas[0]) // len(deltas)
    mean_norm = sum(delta.norm() for delta in deltas) / len(deltas)
    bases, coordinates = [], []
    for delta, (values, vectors) in zip(deltas, spectra, strict=True):
        eigenvalues, directions = values[:k].to(delta.device), vectors[:, :k].to(delta.device)
        weights = (eigenvalues / eigenvalues.mean()) ** EIGENVALUE_POWER
        weights = weights / weights.mean()
        bases.append(directions * weights)
        coordinates.append((delta.norm() / mean_norm) ** POWER * weights[:, None] * (directions.T @ delta))
    E, C = torch.cat(bases, 1), torch.cat(coordinates)
    norms = C.norm(dim=0)
    return E, C * (norms / norms.mean()) ** POWER
