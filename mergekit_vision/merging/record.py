"""What is recorded of a merge."""

import inspect
from collections.abc import Iterator
from typing import Any

from mergekit_vision.merger import Merger, Revisable
from mergekit_vision.support.console import logger

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def own_parameters(merger: Merger) -> dict[str, Any]:
    """A merger's hyper-parameters: what its constructor takes and it keeps under the same name.

    >>> from mergekit_vision.merging.record import own_parameters
    >>> from mergekit_vision.plugins.lines import LiNeS
    >>> list(own_parameters(LiNeS()))
    ['base', 'alpha', 'beta', 'outer']
    """
    parameters = inspect.signature(type(merger)).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind not in _VARIADIC]
    if len(names) < len(parameters):  # what `**` hands on to the parent's constructor
        names += [name for name in vars(merger) if not name.startswith("_") and name not in names]
    return {name: getattr(merger, name) for name in names if _keeps(merger, name)}


def parameter_fault(merger: Merger) -> str | None:
    """Why the hyper-parameters of a merger, or of one that it is composed of, cannot all be told; ``None`` where they can."""
    return next((fault for fault in map(_own_fault, composed(merger)) if fault is not None), None)


def _own_fault(merger: Merger) -> str | None:
    parameters, name = inspect.signature(type(merger)).parameters, type(merger).__name__
    if any(parameter.kind in _VARIADIC for parameter in parameters.values()):
        return f"{name} takes * or ** in its constructor; name each parameter, and keep it as an attribute of that name"
    if hidden := [parameter for parameter in parameters if not _keeps(merger, parameter)]:
        shown, attributes = ", ".join(hidden), ", ".join(f"self.{parameter}" for parameter in hidden)
        return f"{name} does not keep what it was given as {shown}; its constructor must set {attributes}"
    return None


def _keeps(merger: Merger, name: str) -> bool:
    """Whether an instance has an attribute of its own, in its dictionary, in a slot or as a property."""
    return hasattr(merger, name) and (name in vars(merger) or inspect.isdatadescriptor(getattr(type(merger), name, None)))


def merger_record(merger: Merger) -> dict[str, Any]:
    """A merger as data: its class, its hyper-parameters, and in ``recipe`` the methods it is composed of.

    >>> from mergekit_vision.merging.record import merger_record
    >>> from mergekit_vision.plugins.esmpp import ESMPP
    >>> from mergekit_vision.plugins.ties import TIES
    >>> merger_record(ESMPP(base=TIES()))["recipe"]
    'ESMPP(TIES)'
    """
    _warn_once(merger)
    parameters = own_parameters(merger)
    records = {name: merger_record(value) for name, value in parameters.items() if isinstance(value, Merger)}
    parts = [record["recipe"] for record in records.values()]
    return {
        "name": type(merger).__name__,
        "recipe": f"{type(merger).__name__}({', '.join(parts)})" if parts else type(merger).__name__,
        "class_path": class_path(merger),
        "init_args": {**parameters, **records},
    }


def class_path(merger: Merger) -> str:
    """Where a method's class is imported from."""
    return f"{type(merger).__module__}.{type(merger).__qualname__}"


def composed(merger: Merger) -> Iterator[Merger]:
    """A method and those that it is composed of."""
    yield merger
    for part in _parts(merger):
        yield from composed(part)


def needs_images(merger: Merger) -> bool:
    """Whether a method, or one that it is composed of, needs images besides the experts' weights.

    >>> from mergekit_vision.merging.record import needs_images
    >>> from mergekit_vision.plugins.dare import DARE
    >>> from mergekit_vision.plugins.esm import ESM
    >>> needs_images(DARE()), needs_images(DARE(base=ESM())), needs_images(DARE(base=ESM(directions="svd")))
    (False, True, False)
    """
    return any(part.data_needs != "none" for part in composed(merger))


def citations(merger: Merger) -> list[str]:
    """The papers to cite for a merger and for those that it builds on, each once."""
    papers = [merger.paper] if merger.paper else []
    return list(dict.fromkeys([*papers, *(paper for part in _parts(merger) for paper in citations(part))]))


def revisable(merger: Merger) -> Revisable:
    """Whether a method's models can be revised exactly.

    Not where a subclass merges otherwise than what it inherits revises, nor where a record cannot tell how it was set.

    >>> from mergekit_vision.merging.record import revisable
    >>> from mergekit_vision.plugins.ties import TIES
    >>> from mergekit_vision.plugins.tsvm import TSVM
    >>> revisable(TIES()), revisable(TSVM())
    ('no', 'state')
    """
    merges, revises = (next(cls for cls in type(merger).__mro__ if name in vars(cls)) for name in ("merge", "revise"))
    return merger.revisable if issubclass(revises, merges) and parameter_fault(merger) is None else "no"


def _parts(merger: Merger) -> list[Merger]:
    """The methods that a method keeps, under whatever name."""
    return [value for value in {**vars(merger), **own_parameters(merger)}.values() if isinstance(value, Merger)]


def _warn_once(merger: Merger) -> None:
    if (fault := _own_fault(merger)) is not None and fault not in _warned:
        _warned.add(fault)
        logger.warning("%s. Until then not all of its parameters may be recorded, and its results are not remembered", fault)


_warned: set[str] = set()
"""What was said of methods whose parameters cannot be told."""
