"""Layout of a suite file: reading the YAML, finding every fault in it, and making its paths absolute."""

import re
from collections.abc import Callable, Hashable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from mergekit_vision.checkpoints import SUFFIXES
from mergekit_vision.errors import InputError
from mergekit_vision.sources.config import config_faults, resolve
from mergekit_vision.support.faults import closest, raise_faults

_LOCAL = "local-dir:"
_TASK_NAME = re.compile(r"\w[\w-]*")

BUILTIN = {"demo": Path(str(files("mergekit_vision.demo"))) / "suite.yaml"}
"""Suites that the package brings along, by the name that stands for their file."""

_Check = Callable[[Any, str], list[str]]


def locate(path: str | Path) -> Path:
    """Absolute path of a suite file; the name of a built-in suite stands for its file where there is no file of that name.

    Raises:
        InputError: for a bare word that names neither.

    >>> from mergekit_vision.suites.layout import locate
    >>> locate("demo").parts[-3:]
    ('mergekit_vision', 'demo', 'suite.yaml')
    """
    file = Path(path).expanduser().absolute()
    if file.is_file():
        return file
    name = str(path)
    if name in BUILTIN:
        return BUILTIN[name]
    if not file.exists() and re.fullmatch(r"\w+", name):
        known = ", ".join(BUILTIN)
        raise InputError(f"suite {name}: neither a file nor a built-in suite ({known}){closest(name, BUILTIN)}")
    return file


def read_suite(path: Path) -> dict[str, Any]:
    """Content of a suite file with all keys present (absent optional ones as ``None``) and absolute paths.

    Raises:
        InputError: when the file cannot be read or parsed, or with every fault of its layout, one a line.
    """
    try:
        with path.open(encoding="utf-8") as stream:
            content = yaml.load(stream, Loader=_UniqueKeys)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {error}") from error
    faults = _mapping(content, "", {"backbone": _text, "tasks": _tasks}, {"name": _text, "pretrained": _text})
    if not faults and content.get("pretrained") and ":" in content["backbone"]:
        faults = [f"pretrained: {content['backbone']} brings its own weights; remove `pretrained`"]
    raise_faults(path, faults)
    return _completed(content, path)


def _completed(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    root, backbone, pretrained = path.parent, content["backbone"], content.get("pretrained")
    if backbone.startswith(_LOCAL):
        backbone = f"{_LOCAL}{root / Path(backbone[len(_LOCAL) :]).expanduser()}"
    if pretrained and pretrained.endswith(tuple(SUFFIXES)):
        pretrained = str(root / Path(pretrained).expanduser())
    tasks = {
        name: {
            **{key: task.get(key) for key in ("expert", "classes", "templates")},
            "data": {split: resolve(source, root) for split, source in task["data"].items()},
        }
        for name, task in content["tasks"].items()
    }
    return {"name": content.get("name") or path.stem, "backbone": backbone, "pretrained": pretrained, "tasks": tasks}


def _mapping(content: object, where: str, required: Mapping[str, _Check], optional: Mapping[str, _Check]) -> list[str]:
    """Faults of a mapping with known keys, and of its values."""
    place = where or "the file"
    if not isinstance(content, Mapping):
        return [f"{place}: must be a mapping with the keys {', '.join(required)}, not {_shown(content)}"]
    known = {**required, **optional}
    under = f"{where}." if where else ""
    faults = [f"{place}: unknown key `{key}`{closest(str(key), known)}" for key in content if key not in known]
    faults += [f"{place}: `{key}` is missing" for key in required if key not in content]
    for key, check in known.items():
        if key in content:
            faults += check(content[key], f"{under}{key}")
    return faults


def _tasks(tasks: object, where: str) -> list[str]:
    if not isinstance(tasks, Mapping) or not tasks:
        return [f"{where}: must be a mapping of task names to tasks, with one task at least, not {_shown(tasks)}"]
    faults = []
    for name, task in tasks.items():
        if not isinstance(name, str) or not _TASK_NAME.fullmatch(name):
            faults.append(f"{where}: task name {name!r} must be text of letters, digits, `_` and `-` (quote a number)")
        else:
            place = f"{where}.{name}"
            faults += _mapping(task, place, {"expert": _text, "data": _data}, {"classes": _texts, "templates": _templates})
    return faults


def _data(data: object, where: str) -> list[str]:
    if not isinstance(data, Mapping) or not data:
        return [f"{where}: must be a mapping of splits (val, test, train) to data sources, not {_shown(data)}"]
    faults = []
    for split, source in data.items():
        if not isinstance(split, str):
            faults.append(f"{where}: split {split!r} must be text")
        faults += [f"{where}.{split}: {fault}" for fault in config_faults(source)]
    return faults


def _text(value: object, where: str) -> list[str]:
    return [] if isinstance(value, str) and value else [f"{where}: must be text, not {_shown(value)}"]


def _texts(value: object, where: str) -> list[str]:
    if not isinstance(value, list) or not value:
        return [f"{where}: must be a list of texts, not {_shown(value)}"]
    return [
        f"{where}: entry {index} must be text, not {_shown(item)}; put it in quotes"
        for index, item in enumerate(value)
        if not isinstance(item, str) or not item
    ]


def _templates(value: object, where: str) -> list[str]:
    faults = _texts(value, where)
    return faults or [f"{where}: {text!r} has no {{}} for the class name" for text in value if "{}" not in text]  # type: ignore[attr-defined]


def _shown(value: object) -> str:
    """A value in a message: its kind and as much of it as fits."""
    if value is None:
        return "empty"
    text = repr(value)
    return f"the {type(value).__name__} {text if len(text) <= 40 else text[:40] + '…'}"


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, except that a key given twice is an error and not the later value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)
