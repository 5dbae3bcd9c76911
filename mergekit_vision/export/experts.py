"""Routed experts as named tensors and plain data, and back: what ``experts.safetensors`` and its JSON hold."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from mergekit_vision import routers
from mergekit_vision.errors import InputError
from mergekit_vision.routers import LowRankExperts, Router
from mergekit_vision.support.imports import import_by_path, registered

GROUP = "mergekit_vision.routers"
"""Entry points of router classes."""


def pack_experts(routed: Mapping[str, LowRankExperts]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split routed experts into tensors and a description that JSON can hold.

    Returns:
        Tensors by ``<layer>.up``, ``.down``, ``.bias`` and ``.router.<buffer>``, contiguous, on the CPU; and, for each layer in
        forward order, the router's class, its constructor's plain arguments, and the kind of evidence.
    """
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for name, experts in routed.items():
        router = experts.router
        parts = {"up": experts.up, "down": experts.down, "bias": experts.bias}
        parts |= {f"router.{key}": buffer for key, buffer in router.named_buffers()}
        tensors |= {f"{name}.{key}": part.detach().cpu().contiguous() for key, part in parts.items() if part is not None}
        config[name] = {
            "router": f"{type(router).__module__}.{type(router).__qualname__}",
            "arguments": dict(router.arguments()),
            "evidence": experts.evidence,
        }
    return tensors, config


def unpack_experts(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], allow_code: bool = False
) -> dict[str, LowRankExperts]:
    """Rebuild what :func:`pack_experts` split, bit for bit.

    Args:
        tensors: by name.
        config: what describes them.
        allow_code: whether a router class that no installed package registers may be imported.

    Raises:
        InputError: when a tensor is missing, or a router's class cannot be imported or does not take its saved state.
    """
    routed = {}
    for name, entry in config.items():
        parts = {key.removeprefix(f"{name}."): part for key, part in tensors.items() if key.startswith(f"{name}.")}
        missing = [f"{name}.{key}" for key in ("up", "down") if key not in parts]
        if missing:
            raise InputError(f"the experts' file has no tensor {missing[0]}; the file and its JSON do not belong together")
        buffers = {key.removeprefix("router."): part for key, part in parts.items() if key.startswith("router.")}
        try:
            router = _router_class(entry["router"], allow_code)(**buffers, **entry["arguments"])
        except TypeError as error:
            raise InputError(f"{name}: {entry['router']} does not take its saved state: {error}") from error
        routed[name] = LowRankExperts(parts["up"], parts["down"], router, parts.get("bias"), entry["evidence"])
    return routed


def _router_class(path: str, allow_code: bool) -> Callable[..., Router]:
    """A router's class: this package's own, one that an installed package registers, or with ``allow_code`` any."""
    try:
        own = path.rpartition(".")[0] == routers.__name__
        found = getattr(routers, path.rpartition(".")[2], None) if own else registered(GROUP, path)
        if found is None and not (own or allow_code):
            raise InputError(
                f"{path} is registered by no installed package, so it is not imported; install the package that defines it, or, "
                "if you trust the model and the class, allow_code (command line: --allow-code)"
            )
        found = import_by_path(path) if found is None else found
    except InputError as error:
        raise InputError(f"router {error}") from error
    if not (isinstance(found, type) and issubclass(found, Router)):
        raise InputError(f"{path!r} is not a Router")
    return found
