"""What is recorded of a merge."""

from collections.abc import Iterator
from typing import Any

from mergekit_vision.merger import Merger, Revisable


def merger_record(merger: Merger) -> dict[str, Any]:
    """A merger as data: its class, its hyper-parameters, and in ``recipe`` the methods it is composed of.

    >>> from mergekit_vision.merging.record import merger_record
    >>> from mergekit_vision.plugins.esmpp import ESMPP
    >>> from mergekit_vision.plugins.ties import TIES
    >>> merger_record(ESMPP(base=TIES()))["recipe"]
    'ESMPP(TIES)'
    """
    parameters = {name: value for name, value in vars(merger).items() if not name.startswith("_")}
    records = {name: merger_record(value) for name, value in parameters.items() if isinstance(value, Merger)}
    parts = [record["recipe"] for record in records.values()]
    return {
        "name": type(merger).__name__,
        "recipe": f"{type(merger).__name__}({', '.join(parts)})" if parts else type(merger).__name__,
        "class_path": f"{type(merger).__module__}.{type(merger).__qualname__}",
        "init_args": {**parameters, **records},
    }


def composed(merger: Merger) -> Iterator[Merger]:
    """A method and those that it is composed of."""
    yield merger
    for value in vars(merger).values():
        if isinstance(value, Merger):
            yield from composed(value)


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
    for value in vars(merger).values():
        papers += citations(value) if isinstance(value, Merger) else []
    return list(dict.fromkeys(papers))


def revisable(merger: Merger) -> Revisable:
    """Whether a method's models can be revised exactly; not where a subclass merges otherwise than what it inherits revises.

    >>> from mergekit_vision.merging.record import revisable
    >>> from mergekit_vision.plugins.ties import TIES
    >>> from mergekit_vision.plugins.tsvm import TSVM
    >>> revisable(TIES()), revisable(TSVM())
    ('no', 'state')
    """
    merges, revises = (next(cls for cls in type(merger).__mro__ if name in vars(cls)) for name in ("merge", "revise"))
    return merger.revisable if issubclass(revises, merges) else "no"
