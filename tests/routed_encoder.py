"""A small encoder with routed low-rank experts and any kind of router."""

import torch
from open_clip.transformer import VisionTransformer
from tolerances import forward
from torch import Tensor, nn

from mergekit_vision.encoders.attention import LinearAttention
from mergekit_vision.encoders.routed import Routing, attach
from mergekit_vision.routers import CosineRouter, LinearRouter, LowRankExperts, ProjectionRouter, Router, SubspaceRouter

WIDTH, TASKS, RANK = 32, 3, 4
ROUND_OFF = forward(2 * 8 + 2, 4 * WIDTH)
"""Of the encoder's output: two blocks of four Linears with what lies between them, and both ends."""
LINEARS = [f"visual.transformer.resblocks.{i}.{kind}" for i in range(2) for kind in ("attn.in_proj", "mlp.c_fc", "mlp.c_proj")]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_encoder() -> nn.Module:
    torch.manual_seed(0)
    tower = VisionTransformer(image_size=16, patch_size=4, width=WIDTH, layers=2, heads=2, mlp_ratio=4.0, output_dim=16)
    for block in tower.transformer.resblocks:
        block.attn = LinearAttention.from_multihead(block.attn)
    return nn.ModuleDict({"visual": tower.eval()})


def make_router(kind: str, d_in: int, seed: int) -> Router:
    match kind:
        case "cosine":
            return CosineRouter(normal(TASKS, d_in, seed=seed))
        case "centered, mixed":
            return CosineRouter(normal(TASKS, d_in, seed=seed), normal(d_in, seed=seed + 1), top_k=2, temperature=0.1)
        case "linear, all mixed":
            return LinearRouter(normal(TASKS, 2 * d_in, seed=seed), normal(TASKS, seed=seed), ("mean", "deviation"), top_k=TASKS)
        case "linear of covariance, mixed":
            features = 2 * d_in + 10
            basis, offset = normal(d_in, 4, seed=seed + 2) / d_in**0.5, normal(4, seed=seed + 3)
            weight, bias = normal(TASKS, features, seed=seed), normal(TASKS, seed=seed)
            return LinearRouter(weight, bias, ("mean", "first", "covariance"), basis, offset, top_k=2, temperature=3.0)
        case "projection":
            return ProjectionRouter(normal(TASKS, 2, d_in, seed=seed))
        case "projection, mixed":
            return ProjectionRouter(normal(TASKS, 2, d_in, seed=seed), top_k=2)
        case "subspace" | "subspace of several features, mixed":
            pooling = ("first",) if kind == "subspace" else ("mean", "deviation")
            basis = torch.linalg.qr(normal(TASKS, len(pooling) * d_in, 5, seed=seed)).Q.transpose(1, 2)
            center = None if kind == "subspace" else normal(TASKS, 2 * d_in, seed=seed + 1)
            return SubspaceRouter(basis, center, pooling, top_k=len(pooling))
    raise AssertionError(kind)


KINDS = [
    "cosine",
    "centered, mixed",
    "linear, all mixed",
    "linear of covariance, mixed",
    "projection",
    "projection, mixed",
    "subspace",
    "subspace of several features, mixed",
]


def make_experts(encoder: nn.Module, kind: str, size: float = 0.3, evidence: bool = False) -> dict[str, LowRankExperts]:
    routed = {}
    for seed, name in enumerate(LINEARS):
        d_out, d_in = encoder.get_submodule(name).weight.shape
        routed[name] = LowRankExperts(
            up=size * normal(TASKS, d_out, RANK, seed=seed),
            down=size * normal(TASKS, RANK, d_in, seed=seed + 50),
            router=make_router(kind, d_in, seed + 100),
            bias=size * normal(TASKS, d_out, seed=seed + 150),
            evidence="own" if not evidence else "add" if seed else "start",
        )
    return routed


def make_routed(kind: str, **options: object) -> tuple[nn.Module, Routing]:
    encoder = make_encoder()
    return encoder, attach(encoder, make_experts(encoder, kind, **options))
