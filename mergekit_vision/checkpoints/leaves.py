"""What lies in an unpickled object, by its dotted place in it."""

from collections.abc import Container, Iterator
from typing import Any

from mergekit_vision.checkpoints.container import LONGEST_NAME
from mergekit_vision.checkpoints.rebuilding import Stub
from mergekit_vision.checkpoints.stored import StoredTensor

_Holder = dict[str, Any] | list[Any] | tuple[Any, ...]

_PLAIN = (str, int, float, bool, type(None))
_DEPTH = 48
_LONGEST_LIST = 64  # items that are looked at


def leaves(content: Any) -> Iterator[tuple[str, Any]]:
    """Tensors, stubs without parts, and plain values of an unpickled object, by their dotted place in it.

    Entries of dictionaries and attributes of objects are followed; of a module its parameters, its persistent buffers and its
    modules. Lists are plain values where all their items are; of others, dictionaries, objects and lists in them are followed,
    by their number. A container that is in several places is in the least deep of them. What lies deeper than 48 levels, or under
    names that are longer than tensors have, is left out.

    >>> dict(leaves({"state_dict": {"proj": "a tensor"}, "epoch": 3}))
    {'epoch': 3, 'state_dict.proj': 'a tensor'}
    >>> dict(leaves([3, {"proj": "a tensor"}]))
    {'1.proj': 'a tensor'}
    """
    seen: set[int] = set()
    level = [("", content)]
    for _ in range(_DEPTH + 1):
        below: list[tuple[str, Any]] = []
        for place, item in level:
            plain = isinstance(item, StoredTensor) or _is_plain(item)
            holders = [] if plain else _holders(item)
            if plain or (isinstance(item, Stub) and not holders):
                yield place, item
            for holder in holders:
                if id(holder) not in seen:  # what refers to itself, or to one thing many times, would never end
                    seen.add(id(holder))
                    below += _named(holder, place, _transient(item))
        level = below


def _named(holder: _Holder, place: str, skipped: Container[str]) -> Iterator[tuple[str, Any]]:
    """What a holder has, by its place."""
    items = holder.items() if isinstance(holder, dict) else enumerate(holder[:_LONGEST_LIST])
    for key, item in items:
        name = f"{place}.{key}" if place else str(key)
        followed = key not in skipped if isinstance(holder, dict) else bool(_holders(item))
        if followed and len(name) <= LONGEST_NAME:  # long names of nested things multiply
            yield name, item


def _holders(content: Any) -> list[_Holder]:
    """What holds the parts of an object: itself, its entries or its attributes; nothing where it has no parts."""
    if not isinstance(content, Stub):
        return [content] if isinstance(content, dict | list | tuple) else []
    held = content.items or content.state
    if not isinstance(held, dict):
        return []
    if content.items or "_modules" not in held:
        return [held]
    return [part for name in ("_parameters", "_buffers", "_modules") if isinstance(part := held.get(name), dict)]


def _transient(content: Any) -> Container[str]:
    """Names of a module's buffers that are not in its state dictionary."""
    state = content.state if isinstance(content, Stub) else None
    found = state.get("_non_persistent_buffers_set") if isinstance(state, dict) else None
    return found if isinstance(found, dict) else ()  # sets are read as dictionaries


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= _LONGEST_LIST and all(isinstance(item, _PLAIN) for item in value)
    return isinstance(value, _PLAIN)
