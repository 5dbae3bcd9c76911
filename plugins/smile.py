"""SMILE: the backbone plus low-rank experts, chosen per token by the subspaces of the task vectors."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.functional.linalg import pad_rank, top_svd
from mergekit_vision.functional.threads import in_threads
from mergekit_vision.merger import LinearInfo, LinearKind, Merged, MergeInputs, Merger, ModelKind, linears_of_kind
from mergekit_vision.routers import LowRankExperts, ProjectionRouter


@dataclass(frozen=True)
class SMILE(Merger):
    """The backbone plus low-rank experts; each token takes those whose leading input directions it lies in.

    Source: Tang et al., "SMILE: zero-shot sparse mixture of low-rank experts construction from pre-trained foundation models"
    (arXiv 2408.10174). In each routed layer expert ``t`` is the rank-``rank`` SVD of its task vector, together with its bias's
    task vector; a token's score is the norm of its projection onto the ``gate_rank`` leading right singular vectors. The rest
    is the backbone's. The scaling coefficient has no effect.

    Args:
        rank: of the experts, at most the layer's.
        gate_rank: right singular vectors that score a token. Near the layer's full rank all experts score alike.
        top_k: experts a token mixes, weighted by the softmax of their scores.
        layers: which Linear layers of each block are routed.
        rest: parameters outside of the routed layers: the backbone's ("base"), or averaged over the experts ("mean").
    """

    title: ClassVar[str] = "SMILE"
    paper: ClassVar[str] = (
        "Tang et al., SMILE: Zero-Shot Sparse Mixture of Low-Rank Experts Construction From Pre-Trained Foundation Models, "
        "2024, arXiv:2408.10174"
    )
    kind: ClassVar[ModelKind] = "dynamic"

    rank: int = 32
    gate_rank: int = 16
    top_k: int = 1
    layers: tuple[LinearKind, ...] = ("in_proj", "out_proj", "c_fc", "c_proj")
    rest: Literal["base", "mean"] = "base"

    def __post_init__(self) -> None:
        for name in ("rank", "gate_rank", "top_k"):
            if getattr(self, name) < 1:
                raise InputError(f"SMILE: {name} is {getattr(self, name)}, but must be at least 1")
        if self.rest not in ("base", "mean"):
            raise InputError(f"SMILE: rest is {self.rest!r}, but must be one of base, mean")

    def merge(self, inputs: MergeInputs) -> Merged:
        """Decompose the task vectors of the routed layers."""
        linears = linears_of_kind(inputs.linears, self.layers)
        factors = inputs.spread(partial(self._factors, inputs), [linear.weight for linear in linears], "experts")
        routed = {linear.name: self._experts(inputs, linear, *factors[linear.weight]) for linear in linears}
        update = {}
        if self.rest == "mean":
            own = {key for linear in linears for key in (linear.weight, linear.bias)}
            update = {key: inputs.deltas(key).mean(0) for key in inputs.base if key not in own}
        return Merged(update, fixed=frozenset(update), routed=routed)

    def _factors(self, inputs: MergeInputs, key: str) -> tuple[Tensor, Tensor, Tensor]:
        """All experts' ``up [T, d_out, r]`` and ``down [T, r, d_in]`` of one matrix, and what scores tokens, ``[T, g, d_in]``."""
        d_out, d_in = inputs.base[key].shape
        rank, gate = (min(size, d_out, d_in) for size in (self.rank, self.gate_rank))

        def expert(task: str) -> tuple[Tensor, Tensor, Tensor]:
            U, S, Vh = top_svd(inputs.delta(task, key), max(rank, gate))
            return pad_rank(U * S, rank, 1), pad_rank(Vh, rank, 0), pad_rank(Vh, gate, 0)

        up, down, basis = zip(*in_threads(expert, inputs.tasks), strict=True)
        return torch.stack(up), torch.stack(down), torch.stack(basis)

    def _experts(self, inputs: MergeInputs, linear: LinearInfo, up: Tensor, down: Tensor, basis: Tensor) -> LowRankExperts:
        shift = None if linear.bias is None else inputs.deltas(linear.bias)
        return LowRankExperts(up, down, ProjectionRouter(basis, self.top_k), shift)
