"""Values and bytes of which one part is replaced by another."""

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

Place = tuple[str | int, ...]
"""The keys that lead to a part."""


def places(content: Any, above: Place = ()) -> Iterator[Place]:
    """Of every part of some content."""
    yield above
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inside:
        yield from places(value, (*above, key))


def put(content: Any, place: Place, value: Any) -> Any:
    """Content with one part replaced."""
    if not place:
        return value
    content = copy.deepcopy(content)
    part = content
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    return content


def spliced(content: bytes, start: int = 0, end: int | None = None) -> st.SearchStrategy[bytes]:
    """Content of which a few bytes, somewhere from ``start`` to ``end``, are replaced by a few others."""

    def splice(place: int, removed: int, inserted: bytes) -> bytes:
        return content[:place] + inserted + content[place + removed :]

    found = st.builds(splice, st.integers(start, len(content) if end is None else end), st.integers(0, 9), st.binary(max_size=8))
    return found.filter(lambda other: other != content)
