"""The routers of all layers as one that chooses once for each image, as tensors and plain data."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from mergekit_vision.export.adapters import modules_of
from mergekit_vision.routers import CosineRouter, LinearRouter, LowRankExperts, ProjectionRouter, Router, SubspaceRouter

KINDS: dict[type[Router], str] = {
    CosineRouter: "cosine",
    LinearRouter: "linear",
    ProjectionRouter: "projection",
    SubspaceRouter: "subspace",
}
"""Routers whose scores the example can compute."""


def deciding(routed: Mapping[str, LowRankExperts]) -> dict[str, Router]:
    """Layer -> router, of the layers whose scores count: others repeat an earlier decision."""
    return {name: experts.router for name, experts in routed.items() if experts.evidence != "hold"}


def router_faults(routed: Mapping[str, LowRankExperts]) -> list[str]:
    """Routers that the example cannot compute."""
    routers = list(deciding(routed).values())
    others = sorted({type(router).__name__ for router in routers if type(router) not in KINDS})
    known = ", ".join(kind.__name__ for kind in KINDS)
    found = [f"its router {name} cannot be written; only {known} can be chosen by once for each image" for name in others]
    if not found and any(_kind(router) != _kind(routers[0]) for router in routers):
        found = ["its layers have routers of several kinds, or of different features, whose scores cannot be added up"]
    return found


def pack_router(routed: Mapping[str, LowRankExperts]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The routers without :func:`router_faults`.

    Returns:
        Tensors by the module of ``transformers`` whose input is scored, a dot and their name; and the ``kind`` of the scores,
        with the ``pooling`` of those that have one.
    """
    routers = deciding(routed)
    tensors = {
        f"{modules_of(layer)[0]}.{name}": tensor.detach().cpu().contiguous()
        for layer, router in routers.items()
        for name, tensor in _tensors(router).items()
    }
    return tensors, _kind(next(iter(routers.values())))


def _kind(router: Router) -> dict[str, Any]:
    pooling = {"pooling": list(router.pooling)} if isinstance(router, LinearRouter | SubspaceRouter) else {}
    return {"kind": KINDS[type(router)], **pooling}


def _tensors(router: Router) -> dict[str, Tensor]:
    if isinstance(router, CosineRouter):
        center = router.prototypes.new_zeros(router.prototypes.shape[1]) if router.center is None else router.center
        return {"center": center, "prototypes": F.normalize(router.prototypes - center, dim=-1)}
    if isinstance(router, SubspaceRouter):
        center = router.basis.new_zeros(len(router.basis), router.basis.shape[2]) if router.center is None else router.center
        return {"basis": router.basis, "center": center}
    return dict(router.named_buffers())
