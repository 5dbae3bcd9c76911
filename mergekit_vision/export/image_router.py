"""The routers of all layers as one that chooses once for each image, as tensors and plain data."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from mergekit_vision.export.adapters import modules_of
from mergekit_vision.routers import CosineRouter, LinearRouter, LowRankExperts, ProjectionRouter, Router

KINDS: dict[type[Router], str] = {CosineRouter: "cosine", LinearRouter: "linear", ProjectionRouter: "projection"}
"""Routers whose scores the example can compute."""


def deciding(routed: Mapping[str, LowRankExperts]) -> dict[str, Router]:
    """Layer -> router, of the layers whose scores count: others repeat an earlier decision."""
    return {name: experts.router for name, experts in routed.items() if experts.evidence != "hold"}


def router_faults(routed: Mapping[str, LowRankExperts]) -> list[str]:
    """Routers that the example cannot compute."""
    others = {type(router).__name__ for router in deciding(routed).values() if type(router) not in KINDS}
    known = ", ".join(kind.__name__ for kind in KINDS)
    return [f"its router {name} cannot be written; only {known} can be chosen by once for each image" for name in sorted(others)]


def pack_router(routed: Mapping[str, LowRankExperts]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The routers without :func:`router_faults`.

    Returns:
        Tensors by ``<number of the layer>.<name>``, and for each layer the module of ``transformers`` whose input is scored, the
        kind of scores, and what else it takes to compute them.
    """
    tensors: dict[str, Tensor] = {}
    layers = []
    for number, (name, router) in enumerate(deciding(routed).items()):
        tensors |= {f"{number}.{key}": value.detach().cpu().contiguous() for key, value in _tensors(router).items()}
        arguments = {"features": list(router.pooling)} if isinstance(router, LinearRouter) else {}
        layers.append({"module": modules_of(name)[0], "kind": KINDS[type(router)], "arguments": arguments})
    return tensors, layers


def _tensors(router: Router) -> dict[str, Tensor]:
    if isinstance(router, CosineRouter):
        center = router.prototypes.new_zeros(router.prototypes.shape[1]) if router.center is None else router.center
        return {"center": center, "prototypes": F.normalize(router.prototypes - center, dim=-1)}
    return dict(router.named_buffers())
