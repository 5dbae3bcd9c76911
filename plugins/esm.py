"""ESM merging."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.functional.esd import CompactSubspace, ShiftStatistic
from mergekit_vision.functional.esm import EssentialPart, TaskNorm, esm_merge_of, inter_layer_factors
from mergekit_vision.functional.linalg import top_svd
from mergekit_vision.functional.threads import in_threads
from mergekit_vision.merger import DataNeeds, Factors, LinearInfo, Merged, MergeInputs, check_options, check_rank
from mergekit_vision.parts import ByParts, Finder, Part, merged_triplets, shared_out

Directions = Literal["esd", "svd"]
OutProj = Literal["tsvm", "esd", "mean"]
Other = Literal["tsvm", "mean"]
Subspaces = dict[str, CompactSubspace]


@dataclass(frozen=True)
class ESM(ByParts):
    """Essential subspace merging: the directions in which each expert moves its activations on proxy images, made orthogonal.

    Source: Essential Subspace Merging (CVPR 2026), in the form of the authors' code. The matrices of the blocks, attention's
    output projection excepted, are merged in the essential subspaces of the experts' layer inputs; parameters that are no
    matrices are averaged. The scaling coefficient, 1 by default, multiplies the former only; all else is added as it is.

    Args:
        eigenvalue_power: power of the shift eigenvalues that weights directions and coordinates. 0 switches the weights off.
        inter_task: power of a task's relative norm that scales its coordinates.
        inter_dimension: power of an input dimension's relative norm that scales it.
        inter_layer: power of a layer's relative norm, among the layers of its kind, that scales its merged task vector.
        gain: constant factor; doubling it and halving the scaling coefficient gives the same model.
        rank: directions a task keeps, at most the numerical rank. Published, and the default: ``d_out // T``. With "energy" the
            tasks share out so many for each of them: the directions of all are taken in the order of their share of the task's
            eigenvalues. So are the singular triplets of what is merged as in TSV-Merge.
        floor: least share of the default rank that "energy" leaves a task, in [0, 1].
        norm: a task's norm, of the whole task vector ("delta", published code) or of its coordinates in the essential subspace
            ("truncated", paper's text).
        out_proj: how attention's output projection is merged: "tsvm" (published), "esd" like the other block matrices, "mean".
        other: how the matrices outside of the blocks, ``visual.proj`` and ``visual.positional_embedding``, are merged: "tsvm"
            (published) or "mean".
        directions: a task's: those of its activation shift ("esd", published), or the left singular vectors of its task vector
            with the squared singular values as eigenvalues ("svd", the paper's ablation; no proxy image is looked at).
    """

    title: ClassVar[str] = "Essential Subspace Merging"
    paper: ClassVar[str] = "Essential Subspace Merging, CVPR 2026"
    needs: ClassVar[DataNeeds] = "proxies"

    eigenvalue_power: float = 0.15
    inter_task: float = 2.0
    inter_dimension: float = 2.0
    inter_layer: float = 2.0
    gain: float = 2.0
    rank: int | Literal["energy"] | None = None
    norm: TaskNorm = "delta"
    out_proj: OutProj = "tsvm"
    other: Other = "tsvm"
    directions: Directions = "esd"
    floor: float = 0.25

    def __post_init__(self) -> None:
        for name in ("eigenvalue_power", "inter_task", "inter_dimension", "inter_layer", "gain"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise InputError(f"ESM: {name} is {value}, but must be a finite number, 0 or more")
        check_rank(self, "null for d_out // T, or energy", self.rank, self.floor)
        check_options(self, norm=TaskNorm, out_proj=OutProj, other=Other, directions=Directions)

    @property
    def data_needs(self) -> DataNeeds:
        """None for directions "svd"."""
        return "none" if self.directions == "svd" else "proxies"

    def directions_of(self, inputs: MergeInputs, key: str, tasks: int) -> int | None:
        """Essential directions a task, or singular triplets of the matrices that TSV-M merges; by energy, all are looked at."""
        shape = inputs.base[key].shape
        tasks = 1 if self.rank == "energy" else tasks
        if self._is_essential(inputs, key):
            return self.rank if isinstance(self.rank, int) else shape[0] // tasks
        out_proj = any(key == linear.weight and linear.kind == "out_proj" for linear in inputs.linears)
        spectral = len(shape) == 2 and (self.out_proj if out_proj else self.other) == "tsvm"
        return min(shape) // tasks if spectral else None

    def finder(self, inputs: MergeInputs, tasks: int) -> Finder:
        """Run every expert once on its proxy images, which gives its essential subspaces."""
        subspaces = inputs.spread(partial(self._subspaces, inputs, tasks), inputs.tasks, "proxies")

        def find(task: str, key: str, change: Factors | Tensor, count: int) -> Part:
            delta = cast(Tensor, change)
            if self._is_essential(inputs, key):
                return Part(*EssentialPart.of(delta, subspaces[task].pop(key).of(delta)))
            return Part.of_triplets(top_svd(delta.double(), count))

        return find

    def combined(self, inputs: MergeInputs, key: str, parts: Sequence[Part]) -> Tensor:
        """Merge one matrix, up to the scaling of layers."""
        essential = self._is_essential(inputs, key)
        if self.rank == "energy":
            shape, energies = inputs.base[key].shape, [part.weights if essential else part.weights.square() for part in parts]
            parts = shared_out(parts, energies, (shape[0] if essential else min(shape)) // len(parts), self.floor)
        if not essential:
            return merged_triplets(parts)
        return esm_merge_of(
            [EssentialPart(*part) for part in parts],
            eigenvalue_power=self.eigenvalue_power,
            inter_task=self.inter_task,
            inter_dimension=self.inter_dimension,
            gain=self.gain,
            norm=self.norm,
        )

    def finished(self, inputs: MergeInputs, update: dict[str, Tensor]) -> Merged:
        """Scale the layers; all but the essential matrices is fixed."""
        _scale_layers(update, inputs.linears, self.inter_layer)
        return Merged(update, fixed=frozenset(key for key in update if not self._is_essential(inputs, key)))

    def _is_essential(self, inputs: MergeInputs, key: str) -> bool:
        return any(key == linear.weight for linear in self._essential_linears(inputs))

    def _essential_linears(self, inputs: MergeInputs) -> list[LinearInfo]:
        return [linear for linear in inputs.linears if self.out_proj == "esd" or linear.kind != "out_proj"]

    def _subspaces(self, inputs: MergeInputs, tasks: int, task: str) -> Subspaces:
        """A task's essential subspace of every matrix, by key, as large as models of so many tasks need."""
        linears = self._essential_linears(inputs)
        statistics = {
            linear: ShiftStatistic(partial(inputs.delta, task, linear.weight), inputs.base[linear.weight].shape)
            for linear in linears
        }
        moved = {linear.name: statistics[linear] for linear in linears if inputs.changed(task, linear.weight)}
        if self.directions == "svd":  # ESD finds the singular vectors on inputs that favor no direction
            for linear in linears:
                statistics[linear](torch.eye(inputs.base[linear.weight].shape[1], device=inputs.device))
        elif moved:
            inputs.observe(task, moved)

        def decompose(linear: LinearInfo) -> CompactSubspace:
            k = self.directions_of(inputs, linear.weight, tasks) or 0
            try:
                return statistics.pop(linear).compact(k)
            except ValueError as error:
                raise InputError(f"the expert of task {task}, layer {linear.name}: {error}") from error

        return dict(zip((linear.weight for linear in linears), in_threads(decompose, linears), strict=True))


def _scale_layers(update: dict[str, Tensor], linears: tuple[LinearInfo, ...], power: float) -> None:
    """Scale the merged matrices in place by their norm among the layers of their kind, unchanged layers included."""
    for kind in {linear.kind for linear in linears}:
        keys = [linear.weight for linear in linears if linear.kind == kind]
        norms = torch.tensor([float(update[key].double().norm()) if key in update else 0.0 for key in keys])
        for key, factor in zip(keys, inter_layer_factors(norms, power).tolist(), strict=True):
            if key in update:
                update[key] *= factor
