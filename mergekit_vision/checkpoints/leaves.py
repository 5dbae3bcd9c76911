"""What lies in an unpickled object, by its dotted place in it."""

from collections import ChainMap
from collections.abc import Iterator, Mapping
from typing import Any

from mergekit_vision.checkpoints.container import LONGEST_NAME
from mergekit_vision.checkpoints.rebuilding import Stub
from mergekit_vision.checkpoints.stored import StoredTensor

_PLAIN = (str, int, float, bool, type(None))
_DEPTH = 48
_LONGEST_LIST = 64  # items that are looked at


def leaves(content: Any) -> Iterator[tuple[str, Any]]:
    """Tensors, stubs without state, and plain values of an unpickled object, by their dotted place in it.

    Entries of dictionaries and attributes of objects are followed; of a module its parameters, its persistent buffers and its
    modules. Lists are plain values where all their items are; of others, dictionaries, objects and lists in them are followed,
    by their number.

    Raises:
        ValueError: when it is nested too deeply, or names are too long.

    >>> dict(leaves({"state_dict": {"proj": "a tensor"}, "epoch": 3}))
    {'state_dict.proj': 'a tensor', 'epoch': 3}
    >>> dict(leaves([3, {"proj": "a tensor"}]))
    {'1.proj': 'a tensor'}
    """
    yield from _leaves(content, "", set(), 0)


def _leaves(content: Any, place: str, seen: set[int], depth: int) -> Iterator[tuple[str, Any]]:
    if depth > _DEPTH or len(place) > LONGEST_NAME:  # long names of nested things multiply
        raise ValueError("nested too deeply, or names are too long")
    if isinstance(content, StoredTensor) or _is_plain(content):
        yield place, content
        return
    members = _members(content)
    if members is None:
        if isinstance(content, Stub):
            yield place, content
        return
    if id(content) in seen:  # what refers to itself, or to one thing many times, would never end
        return
    seen.add(id(content))
    for name, value in members.items():
        if isinstance(name, str):
            yield from _leaves(value, f"{place}.{name}" if place else name, seen, depth + 1)


def _members(content: Any) -> Mapping[Any, Any] | None:
    """Named parts of an object; ``None`` where it has none."""
    if isinstance(content, dict):
        return content
    if isinstance(content, list | tuple):
        return {str(number): item for number, item in enumerate(content[:_LONGEST_LIST]) if _has_members(item)}
    items, state = (content.items, content.state) if isinstance(content, Stub) else (None, None)
    if not isinstance(state, dict):
        return items
    if items is not None:
        return ChainMap(items, state)
    if "_modules" not in state:
        return state
    transient = state.get("_non_persistent_buffers_set")
    skipped = transient if isinstance(transient, dict) else {}  # sets are read as dictionaries
    parts = [state.get(part) for part in ("_parameters", "_buffers", "_modules")]
    return {name: value for part in parts if isinstance(part, dict) for name, value in part.items() if name not in skipped}


def _has_members(item: Any) -> bool:
    return isinstance(item, dict | list | tuple) or (isinstance(item, Stub) and isinstance(item.items or item.state, dict))


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= _LONGEST_LIST and all(isinstance(item, _PLAIN) for item in value)
    return isinstance(value, _PLAIN)
