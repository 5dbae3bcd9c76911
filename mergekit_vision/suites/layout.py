"""Layout of a suite file: reading the YAML, finding every fault in it, and making its paths absolute."""

import re
from collections.abc import Hashable
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from mergekit_vision.checkpoints import SUFFIXES
from mergekit_vision.errors import InputError
from mergekit_vision.sources.config import Source, Text, resolve
from mergekit_vision.support.faults import closest, raise_faults
from mergekit_vision.support.schema import Schema, brief, faults, shown

_LOCAL = "local-dir:"
_TASK_NAME = re.compile(r"\w[\w-]*")

BUILTIN = {"demo": Path(str(files("mergekit_vision.demo"))) / "suite.yaml"}
"""Suites that the package brings along, by the name that stands for their file."""


def _task_name(name: object) -> object:
    if not isinstance(name, str) or not _TASK_NAME.fullmatch(name):
        raise ValueError(f"task name {brief(name)} must be text of letters, digits, `_` and `-` (quote a number)")
    return name


def _split_name(name: object) -> object:
    if not isinstance(name, str):
        raise ValueError(f"split {brief(name)} must be text")
    return name


def _word(value: object) -> object:
    if not isinstance(value, str) or not value:
        raise ValueError(f"must be text, not {shown(value)}; put it in quotes")
    return value


def _template(text: str) -> str:
    if "{}" not in text:
        raise ValueError(f"{brief(text)} has no {{}} for the class name")
    return text


_TaskName = Annotated[str, BeforeValidator(_task_name)]
_SplitName = Annotated[str, BeforeValidator(_split_name)]
_Word = Annotated[str, BeforeValidator(_word)]
_Template = Annotated[_Word, AfterValidator(_template)]
_Expert = Text


class _Task(Schema):
    expert: _Expert
    data: dict[_SplitName, Source] = Field(min_length=1, description="a mapping of splits (val, test, train) to data sources")
    classes: list[_Word] = Field(default=[], min_length=1, description="a list of texts")
    templates: list[_Template] = Field(default=[], min_length=1, description="a list of texts")


class _Suite(Schema):
    name: Text = ""
    backbone: Text
    pretrained: Text = ""
    tasks: dict[_TaskName, _Task] = Field(min_length=1, description="a mapping of task names to tasks, with one task at least")

    @model_validator(mode="after")
    def _one_origin_of_weights(self) -> "_Suite":
        if self.pretrained and ":" in self.backbone:
            raise ValueError(f"{self.backbone} brings its own weights; remove `pretrained`")
        return self


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
    raise_faults(path, faults(_Suite, content, "the file"))
    return _completed(_Suite.model_validate(content), path)


def _completed(suite: _Suite, path: Path) -> dict[str, Any]:
    root, backbone, pretrained = path.parent, suite.backbone, suite.pretrained
    if backbone.startswith(_LOCAL):
        backbone = f"{_LOCAL}{root / Path(backbone[len(_LOCAL) :]).expanduser()}"
    if pretrained.endswith(tuple(SUFFIXES)):
        pretrained = str(root / Path(pretrained).expanduser())
    tasks = {
        name: {
            "expert": task.expert,
            "classes": task.classes or None,
            "templates": task.templates or None,
            "data": {split: resolve(source, root) for split, source in task.data.items()},
        }
        for name, task in suite.tasks.items()
    }
    return {"name": suite.name or path.stem, "backbone": backbone, "pretrained": pretrained or None, "tasks": tasks}


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
