"""What a suite file stands for: a published suite that it extends, and what lies on disk under its roots."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_vision.errors import InputError
from mergekit_vision.suites.catalog import PublishedSuite, published
from mergekit_vision.suites.disk import find_data, find_expert
from mergekit_vision.support.faults import closest, raise_faults
from mergekit_vision.support.paths import expanded, is_directory
from mergekit_vision.support.yaml_files import read_yaml

ROOTS = {"experts_root": "MERGEKIT_VISION_EXPERTS", "data_root": "MERGEKIT_VISION_DATA"}
"""Key of a suite file -> the environment variable that stands in for it."""

Content = dict[str, Any]


def composed(path: Path) -> Any:
    """Content of a suite file with everything that it takes from elsewhere, to be checked as if it had been written there.

    What is malformed is left as it is.

    Raises:
        InputError: when the file cannot be read, it extends what is no published suite, or a root lacks a task.
    """
    name = next((name for name, file in published().items() if file == path), None)
    own = {} if name else read_yaml(path)
    if not isinstance(own, Mapping):
        return own
    name = name or own.get("extends")
    if isinstance(name, str) and name not in published():
        raise_faults(path, [f"extends: no published suite {name}{closest(name, published())}; `suites` lists them"])
    suite = PublishedSuite.load(name) if isinstance(name, str) else None
    content = _overlaid(suite.content if suite else {}, own)
    _take_from_disk(path, content, own, suite)
    return content


def _overlaid(base: Mapping[str, Any], own: Mapping[str, Any]) -> Content:
    """A suite with another's keys in place of its own; a task of ``null`` is left out."""
    content = {**base, **own}
    if "backbone" in own and "pretrained" not in own:
        content.pop("pretrained", None)
    tasks, known = own.get("tasks", {}), base.get("tasks", {})
    if isinstance(tasks, Mapping) and (base or "tasks" in own):
        left_out = {name for name, task in tasks.items() if task is None and name in known}
        names = [name for name in dict.fromkeys([*known, *tasks]) if name not in left_out]
        content["tasks"] = {name: _task(known.get(name, {}), tasks.get(name, {})) for name in names}
    return content


def _task(base: Mapping[str, Any], own: object) -> object:
    if not isinstance(own, Mapping):
        return own
    stale = {"accuracy"} if "expert" in own else set()
    stale |= {"misnamed", "traps"} if "classes" in own else set()
    task = {**{key: value for key, value in base.items() if key not in stale}, **own}
    if "data" in base and isinstance(own.get("data"), Mapping):
        task["data"] = {**base["data"], **own["data"]}
    return task


def _take_from_disk(path: Path, content: Content, own: Mapping[str, Any], suite: PublishedSuite | None) -> None:
    """Put what lies under the roots in place of what the file itself does not name."""
    roots = {key: _root(path, own, key) for key in ROOTS}
    if not any(roots.values()) or not isinstance(content.get("tasks"), Mapping):
        return
    tasks = own.get("tasks", {})
    found = {name: _OnDisk(name, task, tasks.get(name, {}), suite) for name, task in content["tasks"].items()}
    experts, data = (any(getattr(task, need) for task in found.values()) for need in ("needs_expert", "needs_data"))
    needed = {"experts_root": experts, "data_root": data}
    wrong = [key for key, root in roots.items() if root and needed[key] and not is_directory(root)]
    raise_faults(path, [f"{key}: {roots[key]}: no such directory" for key in wrong])
    backbone = str(content.get("backbone", ""))
    faults = [fault for task in found.values() for fault in task.take(roots["experts_root"], roots["data_root"], backbone)]
    raise_faults(path, faults)
    content["tasks"] = {name: task.content for name, task in found.items()}


def _root(path: Path, own: Mapping[str, Any], key: str) -> Path | None:
    """The directory of a root, from the file or the environment."""
    named, variable = own.get(key), os.environ.get(ROOTS[key])
    try:
        if isinstance(named, str) and named:
            return path.parent / expanded(named)
        return expanded(variable).absolute() if variable and named is None else None
    except InputError as error:
        raise InputError(f"{path}: {key if named else ROOTS[key]}: {error}") from error


class _OnDisk:
    """A task whose expert and data may lie on disk.

    Args:
        name: of the task.
        content: in the composed suite; replaced as things are found.
        own: what the file itself says of the task.
        suite: the published suite, which knows other names of the task.

    Attributes:
        content: as it is then.
        needs_expert: whether the expert is not named by the file itself.
        needs_data: whether a split is not.
    """

    def __init__(self, name: object, content: Any, own: Any, suite: PublishedSuite | None) -> None:
        known = suite.tasks.get(str(name)) if suite else None
        self._names, self._name, self.content = known.aliases if known else (str(name),), name, content
        sound = isinstance(content, Mapping) and isinstance(own, Mapping)
        named, published = (part.get("data", {}) if sound else {} for part in (own, content))
        self.needs_expert = sound and "expert" not in own
        self.needs_data = sound and isinstance(named, Mapping) and not (named and published.keys() <= named.keys())
        self._named, self._published = named, published

    def take(self, experts: Path | None, data: Path | None, backbone: str) -> list[str]:
        """Look up what the file does not name below the roots; what is not there, one text each."""
        found = self._take_expert(experts, backbone) if experts and self.needs_expert else []
        return found + (self._take_data(data) if data and self.needs_data else [])

    def _take_expert(self, root: Path, backbone: str) -> list[str]:
        found = find_expert(root, self._names, backbone)
        if len(found) == 1:
            self.content = {**self.content, "expert": str(found[0])}
            return []
        if found:
            listed = ", ".join(map(str, found))
            return [f"tasks.{self._name}.expert: more than one in {root} ({listed}); name the one that is meant by `expert`"]
        return [self._missing("expert", root)]

    def _take_data(self, root: Path) -> list[str]:
        others = {split: source for split, source in self._published.items() if split not in self._named}
        found = find_data(root, self._names, others)
        self.content = {**self.content, "data": {**found, **self._named}}
        return [] if self.content["data"] else [self._missing("data", root)]

    def _missing(self, key: str, root: Path) -> str:
        names = " or ".join(self._names)
        return f"tasks.{self._name}.{key}: none in {root} by the name {names}; name it by `{key}`, or correct the root"
