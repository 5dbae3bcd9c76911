"""Routed experts as named tensors and plain data, and back: what ``experts.safetensors`` and its JSON hold."""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator
from torch import Tensor

from mergekit_vision import routers
from mergekit_vision.errors import InputError
from mergekit_vision.routers import Evidence, LowRankExperts, Router
from mergekit_vision.support.imports import import_by_path, registered
from mergekit_vision.support.schema import Schema, shown
from mergekit_vision.support.tensors import FINITE, unusable

GROUP = "mergekit_vision.routers"
"""Entry points of router classes."""

_REMEDY = "merge again"


def _checked(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a router, of which those that all routers have are known."""
    top_k, temperature = arguments.get("top_k", 1), arguments.get("temperature", 1.0)
    if type(top_k) is not int or top_k < 1:
        raise ValueError(f"`top_k` must be a whole number above 0, not {shown(top_k)}")
    if type(temperature) not in (int, float) or not 0 < temperature < math.inf:
        raise ValueError(f"`temperature` must be a finite number above 0, not {shown(temperature)}")
    return arguments


class RoutedLayer(Schema):
    """What ``experts.json`` says of a layer: its router's class and plain arguments, kind of evidence, and ranks that differ."""

    router: str
    arguments: Annotated[dict[str, Any], AfterValidator(_checked)]
    evidence: Evidence
    ranks: list[int] | None = None


def pack_experts(routed: Mapping[str, LowRankExperts]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split routed experts into tensors and a description that JSON can hold.

    Returns:
        Tensors by ``<layer>.up``, ``.down``, ``.bias`` and ``.router.<buffer>``, contiguous, on the CPU; and, for each layer in
        forward order, the router's class, its constructor's plain arguments, and the kind of evidence. Where the experts of a
        layer differ in rank, their factors lie side by side, and their ranks are given.
    """
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for name, experts in routed.items():
        router = experts.router
        parts, ranks = experts.stored()
        tensors |= {f"{name}.{key}": part.detach().cpu().contiguous() for key, part in parts.items()}
        config[name] = {
            "router": f"{type(router).__module__}.{type(router).__qualname__}",
            "arguments": dict(router.arguments()),
            "evidence": experts.evidence,
            **({} if ranks is None else {"ranks": ranks}),
        }
    return tensors, config


def unpack_experts(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], allow_code: bool = False
) -> dict[str, LowRankExperts]:
    """Rebuild what :func:`pack_experts` split, bit for bit.

    Args:
        tensors: by name.
        config: what describes them, each layer as a :class:`RoutedLayer` says.
        allow_code: whether a router class that no installed package registers may be imported.

    Raises:
        InputError: when tensors and layers do not belong together, a tensor holds NaN or infinity or has another shape than it
            must, or a router's class cannot be imported or does not take its saved state.
    """
    faults = unusable(tensors, FINITE)
    if faults:
        raise InputError(f"{faults[0]}; {_REMEDY}")
    missing = [f"{name}.{key}" for name in config for key in ("up", "down") if f"{name}.{key}" not in tensors]
    if missing:
        raise InputError(f"the experts' file has no tensor {missing[0]}; it and its JSON do not belong together; {_REMEDY}")
    routed = {name: _unpacked(name, _parts(name, tensors), entry, allow_code) for name, entry in config.items()}
    left = tensors.keys() - {f"{name}.{key}" for name in config for key in _parts(name, tensors)}
    if left:
        raise InputError(f"the experts' JSON has no layer for the tensor {min(left)}; a layer was left out; {_REMEDY}")
    _check_evidence(routed)
    return routed


def _parts(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a layer."""
    return {key.removeprefix(f"{name}."): part for key, part in tensors.items() if key.startswith(f"{name}.")}


def _unpacked(name: str, parts: Mapping[str, Tensor], entry: Mapping[str, Any], allow_code: bool) -> LowRankExperts:
    """The experts of a layer, with a router that can route among them."""
    other = [key for key in ("up", "down", "bias") if key in parts and not parts[key].is_floating_point()]
    if other:
        raise InputError(f"{name}.{other[0]} is {parts[other[0]].dtype}, but must hold floating-point numbers; {_REMEDY}")
    buffers = {key.removeprefix("router."): part for key, part in parts.items() if key.startswith("router.")}
    router_class = _router_class(entry["router"], allow_code)
    try:
        router = router_class(**buffers, **entry["arguments"])
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {entry['router']} does not take its saved state: {error}; {_REMEDY}") from error
    try:
        up, down, ranks = parts["up"], parts["down"], entry.get("ranks")
        up, down = (up, down) if ranks is None else LowRankExperts.padded(up, down, ranks)
        experts = LowRankExperts(up, down, router, parts.get("bias"), entry["evidence"])
        experts.check_router()
    except ValueError as error:
        raise InputError(f"{name}: {error}; {_REMEDY}") from error
    return experts


def _check_evidence(routed: Mapping[str, LowRankExperts]) -> None:
    """Refuse layers that decide by evidence which no layer before them started, or started for other experts."""
    started = max((len(experts.down) for experts in routed.values() if experts.evidence == "ahead"), default=0)
    for name, experts in routed.items():
        if experts.evidence == "start":
            started = len(experts.down)
        elif experts.evidence != "own" and started != len(experts.down):
            raise InputError(
                f"{name}: evidence is {experts.evidence!r}, but no layer before it starts any for its experts; {_REMEDY}"
            )


def _router_class(path: str, allow_code: bool) -> Callable[..., Router]:
    """A router's class: this package's own, one that an installed package registers, or with ``allow_code`` any."""
    try:
        own = path.rpartition(".")[0] == routers.__name__
        found = getattr(routers, path.rpartition(".")[2], None) if own else registered(GROUP, path)
        if found is None and not (own or allow_code):
            raise InputError(
                f"{path:.80} is registered by no installed package, so it is not imported; install the package that defines it, "
                "or, if you trust the model and the class, allow_code (command line: --allow-code)"
            )
        found = import_by_path(path) if found is None else found
    except InputError as error:
        raise InputError(f"router {error}") from error
    if not (isinstance(found, type) and issubclass(found, Router)):
        raise InputError(f"{path!r:.80} is not a Router")
    return found
