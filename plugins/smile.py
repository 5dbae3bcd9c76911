"""SMILE: the backbone plus low-rank experts, chosen per token by the subspaces of the task vectors."""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mergekit_vision.fitting import RouterFit, check_held_layer, deciding, evidence_of, routed
from mergekit_vision.functional.linalg import pad_rank, top_svd
from mergekit_vision.functional.threads import in_threads
from mergekit_vision.merger import (
    DataNeeds,
    LinearKind,
    Merged,
    MergeInputs,
    Merger,
    ModelKind,
    check_kinds,
    check_options,
    check_whole,
    linears_of_kind,
)
from mergekit_vision.routers import ProjectionRouter, Router, SubspaceRouter

Rule = Literal["projection", "mass", "sim"]
Decision = Literal["layer", "once"]


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
        top_k: experts a token, or an image, mixes, weighted by the softmax of their scores.
        layers: which Linear layers of each block are routed.
        rest: parameters outside of the routed layers: the backbone's ("base"), or averaged over the experts ("mean").
        rule: the norm of each token's "projection" (published); or the distance of the image's class token from the same singular
            vectors ("mass", arXiv 2504.05342), or from the mean and the ``gate_rank`` leading principal directions of each task's
            class tokens in the backbone ("sim", arXiv 2606.22589; needs proxy images).
        decision: each "layer" by its own scores (published); or all "once" for an image, by the scores that ``held_layer`` gives
            in a run of the backbone ahead.
        held_layer: index among the routed layers; where ``None``, the scores of all are added up.
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
    rule: Rule = "projection"
    decision: Decision = "layer"
    held_layer: int | None = None

    def __post_init__(self) -> None:
        check_whole(self, 1, "rank", "gate_rank", "top_k")
        check_kinds(self, self.layers)
        check_options(self, rest=Literal["base", "mean"], rule=Rule, decision=Decision)
        check_held_layer("SMILE", self.decision, self.held_layer)

    @property
    def data_needs(self) -> DataNeeds:
        """Proxy images for the rule "sim" alone."""
        return "proxies" if self.rule == "sim" else "none"

    def merge(self, inputs: MergeInputs) -> Merged:
        """Decompose the task vectors of the routed layers."""
        linears = linears_of_kind(inputs.linears, self.layers)
        evidence = evidence_of("SMILE", self.decision, self.held_layer, linears)
        parts = inputs.spread(partial(self._factors, inputs), [linear.weight for linear in linears], "experts")
        update = {}
        if self.rest == "mean":
            own = {key for linear in linears for key in (linear.weight, linear.bias)}
            update = {key: inputs.deltas(key).mean(0) for key in inputs.base if key not in own}
        model = Merged(update, fixed=frozenset(update))
        bases = {linear.name: parts[linear.weight][2] for linear in deciding(linears, evidence)}
        factors = {linear.name: parts[linear.weight][:2] for linear in linears}
        biases = {linear.name: inputs.deltas(linear.bias) for linear in linears if linear.bias is not None}
        return replace(model, routed=routed(factors, self._routers(inputs, bases, model), evidence, biases))

    def _factors(self, inputs: MergeInputs, key: str) -> tuple[Tensor, Tensor, Tensor]:
        """All experts' ``up [T, d_out, r]`` and ``down [T, r, d_in]`` of one matrix, and what scores tokens, ``[T, g, d_in]``."""
        d_out, d_in = inputs.base[key].shape
        rank, gate = (min(size, d_out, d_in) for size in (self.rank, self.gate_rank))

        def expert(task: str) -> tuple[Tensor, Tensor, Tensor]:
            U, S, Vh = top_svd(inputs.delta(task, key), max(rank, gate))
            return pad_rank(U * S, rank, 1), pad_rank(Vh, rank, 0), pad_rank(Vh, gate, 0)

        up, down, basis = zip(*in_threads(expert, inputs.tasks), strict=True)
        return torch.stack(up), torch.stack(down), torch.stack(basis)

    def _routers(self, inputs: MergeInputs, bases: dict[str, Tensor], model: Merged) -> dict[str, Router]:
        """By name of the layer, from the right singular vectors of its task vectors or from its class tokens in the backbone."""
        if self.rule == "sim":
            fit = RouterFit("SMILE", "sim", ("first",), self.gate_rank, top_k=self.top_k)
            return fit.of_features(fit.features(inputs, list(bases), model, {}), {})
        if self.rule == "mass":
            return {name: SubspaceRouter(basis, top_k=self.top_k) for name, basis in bases.items()}
        return {name: ProjectionRouter(basis, self.top_k) for name, basis in bases.items()}
