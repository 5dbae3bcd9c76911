"""What of a merge's record can be shown to others: no directory of the machine it was made on."""

import re
from collections.abc import Mapping
from pathlib import PureWindowsPath
from typing import Any

_LOCAL = "local-dir:"
_HUB = re.compile(r"hf-hub:([\w.-]+/[\w.-]+)")


def shareable(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with names of files in place of their paths; experts of the hub have their ids.

    >>> from mergekit_vision.export.sharing import shareable
    >>> shareable({"backbone": "local-dir:/home/me/clip", "experts": {"a": "x/a.pt", "b": "hf-hub:org/b"}, "rest": ["/x/y", 1]})
    {'backbone': 'local-dir:clip', 'experts': {'a': 'a.pt', 'b': 'hf-hub:org/b'}, 'rest': ['y', 1]}
    """
    sources = record.get("sources", {})
    names = {task: sources.get(task, {}).get("hub", path) for task, path in record["experts"].items()}
    experts = {task: name if hub_id(name) else without_directories(name, always=True) for task, name in names.items()}
    return {**without_directories(record), "experts": experts}


def hub_id(name: str) -> str | None:
    """The repository that ``hf-hub:org/name…`` stands for; ``None`` for other names."""
    match = _HUB.match(name)
    return match[1] if match else None


def without_directories(value: Any, always: bool = False) -> Any:
    """Plain data in which paths are cut to their last part: those that lead out of a directory, or ``always`` all."""
    if isinstance(value, Mapping):
        return {key: without_directories(item, always) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_directories(item, always) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith(_LOCAL):
        return _LOCAL + PureWindowsPath(value.removeprefix(_LOCAL)).name
    path = PureWindowsPath(value)  # knows both kinds of slashes
    leads_out = path.root or path.parts[:1] in (("~",), ("..",))
    return path.name or value if always or leads_out else value
