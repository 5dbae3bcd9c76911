"""The published suites: what the package knows of the field's benchmarks, as the content of suite files.

A suite of ``published/`` is a file of three lines: a family of experts, a backbone, and how many tasks. The family's JSON file
has its experts, accuracies and validation rule, and ``published/tasks/`` one JSON file a task with its classes, templates and
data. Each names where it is from.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from mergekit_vision.support.files import cache_dir

_ROOT = Path(str(files("mergekit_vision.suites"))) / "published"


@cache
def published() -> Mapping[str, Path]:
    """Name -> file of every published suite, those of a family and backbone from few tasks to many."""
    return {f"{path.parent.name}/{path.stem}": path for path in sorted(_ROOT.glob("*/*.yaml"), key=_order)}


def _order(path: Path) -> tuple[str, str, int]:
    backbone, _, tasks = path.stem.rpartition("-")
    return path.parent.name, backbone, int(tasks)


@dataclass(frozen=True)
class PublishedTask:
    """A task of a published suite.

    Attributes:
        name: as in suite files.
        title: as papers write it.
        expert: the expert's address on the hub.
        aliases: what people call its directories on disk.
        images: images of the splits ``train`` and ``test``.
        license: of the data, where known.
        variant: why its texts are not those of the data set, where they are not.
        content: of the task in a suite file.
    """

    name: str
    title: str
    expert: str
    aliases: tuple[str, ...]
    images: Mapping[str, int]
    license: str | None
    variant: str | None
    content: Mapping[str, Any]


@dataclass(frozen=True)
class PublishedSuite:
    """A published suite.

    Attributes:
        name: such as ``tall/ViT-B-32-8``.
        tasks: by name, in the order of the family.
        expert_gb: size of one expert, in units of 10^9 bytes.
        experts_license: where known.
        validation: what the split ``val`` is.
        caveat: what is not certain about the experts.
        content: of the whole in a suite file.
    """

    name: str
    tasks: Mapping[str, PublishedTask]
    expert_gb: float
    experts_license: str | None
    validation: str
    caveat: str | None
    content: Mapping[str, Any]

    @classmethod
    def load(cls, name: str) -> "PublishedSuite":
        """The suite of a name that :func:`published` has."""
        short = yaml.safe_load(published()[name].read_text(encoding="utf-8"))
        family = _json(f"{short['family']}.json")
        backbone, chosen = family["backbones"][short["backbone"]], list(family["tasks"])[: short["tasks"]]
        tasks = {task: _task(task, family, backbone) for task in chosen}
        content = {
            "name": name,
            "backbone": backbone["open_clip"],
            "pretrained": "openai",
            "tasks": {task: dict(known.content) for task, known in tasks.items()},
        }
        rule, caveat = family["validation"]["rule"], backbone.get("caveat")
        return cls(name, tasks, backbone["gb"], family["experts_license"], rule, caveat, content)


@cache
def expert_bytes() -> Mapping[str, int]:
    """Address on the hub -> size of the expert there, of every expert of a published suite."""
    suites = [PublishedSuite.load(name) for name in published() if name.endswith("-20")]
    return {task.expert: round(suite.expert_gb * 1e9) for suite in suites for task in suite.tasks.values()}


def published_images(source: Mapping[str, Any]) -> int | None:
    """Number of images of a split that a published suite has too, be it divided there or not; ``None`` for any other.

    >>> from mergekit_vision.suites.catalog import published_images
    >>> published_images({"hub": "tanganke/sun397", "split": "train"})
    19850
    """
    return _images().get(_data_set(source))


@cache
def _images() -> Mapping[tuple[str, ...], int]:
    """Data set and split -> number of images, of every task."""
    tasks = [_json(f"tasks/{file.name}") for file in (_ROOT / "tasks").glob("*.json")]
    return {_data_set(_rooted(task["data"][split])): task["images"][split] for task in tasks for split in ("train", "test")}


def _data_set(source: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells one split of a data set from others; revisions have the same images."""
    own = ("hub", "name", "split") if "hub" in source else ("torchvision",)
    args = {key: value for key, value in source.get("args", {}).items() if key not in ("root", "download")}
    return (*(str(source.get(key, "")) for key in own), repr(sorted(args.items())))


def _task(name: str, family: Mapping[str, Any], backbone: Mapping[str, Any]) -> PublishedTask:
    own, facts = family["tasks"][name], _json(f"tasks/{name}.json")
    variant = facts.get("variants", {}).get(own.get("variant"), {})
    expert = backbone["experts"].format(own["expert"])
    reason = variant.get("why")
    content = {
        "expert": expert,
        "data": _data(facts["data"], family["validation"]["cap"]),
        "classes": variant.get("classes", facts["classes"]),
        "templates": facts["templates"],
        "traps": [*([reason] if reason else []), *facts.get("traps", []), *own.get("traps", [])],
    }
    if "misnamed" in variant:
        content["misnamed"] = variant["misnamed"]
    if "at_most" in facts:
        content["at_most"] = facts["at_most"]
    if name in backbone.get("accuracies", {}):
        content["accuracy"] = backbone["accuracies"][name]
    aliases = (name, facts["name"], own["expert"], *([] if ":" in expert.removeprefix("hf-hub:") else [expert.split("/")[1]]))
    license_ = facts.get("license")
    return PublishedTask(name, facts["name"], expert, tuple(dict.fromkeys(aliases)), facts["images"], license_, reason, content)


def _data(sources: Mapping[str, Mapping[str, Any]], cap: bool) -> dict[str, dict[str, Any]]:
    """The splits of a task: ``val`` and ``train`` divide the published train split."""
    rule = {} if cap else {"cap": False}
    train, test = (_rooted(sources[split]) for split in ("train", "test"))
    return {"val": {**train, "part": "val", **rule}, "test": test, "train": {**train, "part": "train", **rule}}


def _rooted(source: Mapping[str, Any]) -> dict[str, Any]:
    """The source; what torchvision downloads lies in the cache."""
    if "args" not in source:
        return dict(source)
    return {**source, "args": {**source["args"], "root": str(cache_dir() / source["args"]["root"])}}


@cache
def _json(name: str) -> Any:
    return json.loads((_ROOT / name).read_text(encoding="utf-8"))
