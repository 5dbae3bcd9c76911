"""Layout of a suite file: reading the YAML, finding every fault in it, and making its paths absolute."""

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, WithJsonSchema, model_validator

from mergekit_vision.checkpoints import SUFFIXES, ExpertSource
from mergekit_vision.checkpoints.expert import Kind
from mergekit_vision.checkpoints.hub import HubFile
from mergekit_vision.errors import InputError
from mergekit_vision.sources.config import Source, resolve
from mergekit_vision.suites.catalog import published
from mergekit_vision.suites.composing import composed
from mergekit_vision.support.faults import closest, raise_faults
from mergekit_vision.support.paths import expanded, is_directory, is_file
from mergekit_vision.support.schema import FilePath, Schema, Text, brief, faults, shown

LOCAL = "local-dir:"
_TASK_NAME = re.compile(r"\w[\w-]*")

BUILTIN = {"demo": Path(str(files("mergekit_vision.demo"))) / "suite.yaml", **published()}
"""Suites that the package brings along, by the name that stands for their file."""

_FAMILIES = {name.split("/")[0] for name in published()}


def _task_name(name: object) -> object:
    if not isinstance(name, str) or not _TASK_NAME.fullmatch(name):
        raise ValueError(f"task name {brief(name)} must be text of letters, digits, `_` and `-` (quote a number)")
    return name


def _split_name(name: object) -> object:
    if not isinstance(name, str):
        raise ValueError(f"split {brief(name)} must be text")
    return name


def _word(value: object) -> object:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"must be text, not {shown(value)}; put it in quotes")
    return value


def _template(text: str) -> str:
    if "{}" not in text:
        raise ValueError(f"{brief(text)} has no {{}} for the class name")
    return text


def _backbone(name: str) -> str:
    expanded(name.removeprefix(LOCAL))
    return name


_TaskName = Annotated[str, BeforeValidator(_task_name)]
_SplitName = Annotated[str, BeforeValidator(_split_name)]
_Word = Annotated[str, BeforeValidator(_word)]
_Template = Annotated[_Word, AfterValidator(_template)]


class _ExpertMapping(Schema):
    path: FilePath = ""
    hub: Text = ""
    revision: Text | None = None
    kind: Kind = Field(default="auto", description="auto, weights, delta or lora")
    key: Text | None = None
    ema: bool | None = None
    scale: float | None = None

    @model_validator(mode="after")
    def _one_place(self) -> "_ExpertMapping":
        if bool(self.path) == bool(self.hub):
            raise ValueError("needs `path`, of a file or directory, or `hub`, org/name of a repository, and not both")
        if self.revision and not self.hub:
            raise ValueError("`revision` goes with `hub`")
        if self.hub:
            HubFile.parse(self.hub)
        return self

    def source(self, root: Path) -> ExpertSource:
        """Where the expert is, and how it is read."""
        hub = HubFile.parse(self.hub) if self.hub else None
        if hub is not None and self.revision:
            hub = hub._replace(revision=self.revision)
        path = root / expanded(self.path) if self.path else None
        return ExpertSource(path, hub, self.kind, self.key, self.ema, self.scale)


def _expert(value: object) -> object:
    """The text or the mapping as it is, once it has been checked."""
    if isinstance(value, Mapping):
        return _ExpertMapping.model_validate(dict(value))
    if not isinstance(value, str) or not value:
        raise ValueError(
            f"must be the path of a checkpoint, hf-hub:org/name, or a mapping of `path` and more, not {shown(value)}"
        )
    ExpertSource.parse(value, Path())
    return value


_EXPERT_AS_JSON = {"anyOf": [{"type": "string", "minLength": 1}, _ExpertMapping.model_json_schema()]}
_Expert = Annotated[str | _ExpertMapping, PlainValidator(_expert), WithJsonSchema(_EXPERT_AS_JSON)]


class _Task(Schema):
    expert: _Expert
    data: dict[_SplitName, Source] = Field(min_length=1, description="a mapping of splits (val, test, train) to data sources")
    classes: list[_Word] = Field(default=[], min_length=1, description="a list of texts")
    templates: list[_Template] = Field(default=[], min_length=1, description="a list of texts")
    accuracy: float | None = Field(default=None, ge=0, le=100, description="the published accuracy of the expert, in percent")
    at_most: float | None = Field(default=None, ge=0, le=100, description="a better expert has seen the test images, in percent")
    misnamed: list[int] = Field(default=[], description="a list of class indices")
    traps: list[_Word] = Field(default=[], description="a list of texts")

    @model_validator(mode="after")
    def _misnamed_classes(self) -> "_Task":
        if wrong := [index for index in self.misnamed if not 0 <= index < len(self.classes)]:
            raise ValueError(f"`misnamed` holds {brief(wrong[0])}, which is no index in `classes`")
        return self


class _Suite(Schema):
    name: Text = ""
    backbone: Annotated[Text, AfterValidator(_backbone)]
    pretrained: FilePath = ""
    tasks: dict[_TaskName, _Task] = Field(min_length=1, description="a mapping of task names to tasks, with one task at least")
    extends: Text | None = Field(default=None, description="the name of a published suite")
    experts_root: FilePath = ""
    data_root: FilePath = ""

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
    name = str(path)
    if not name.strip():
        raise InputError("`suite` is empty; name a suite file", of="data")
    file = expanded(path).absolute()
    if is_file(file):
        return file
    if name in BUILTIN:
        return BUILTIN[name]
    if not is_directory(file) and (re.fullmatch(r"\w+", name) or name.split("/")[0] in _FAMILIES):
        known = "demo, and those that `mergekit-vision suites` lists"
        raise InputError(f"suite {name}: neither a file nor a built-in suite ({known}){closest(name, BUILTIN)}")
    return file


def read_suite(path: Path) -> dict[str, Any]:
    """Content of a suite file with all keys present (absent optional ones as ``None``) and absolute paths.

    Raises:
        InputError: when the file cannot be read or parsed, or with every fault of its layout, one a line.
    """
    content = composed(path)
    raise_faults(path, faults(_Suite, content, "the file"))
    return _completed(_Suite.model_validate(content), path)


def suite_schema() -> dict[str, Any]:
    """JSON Schema of suite files, for editors; what only code can check is not in it."""
    schema: dict[str, Any] = _plain(_Suite.model_json_schema())
    for part in (schema, task := schema["$defs"]["_Task"]):
        del part["required"]
    task["description"] = "one classification task and its expert; of a suite that extends another, what differs"
    tasks = schema["properties"]["tasks"]
    tasks["additionalProperties"] = {"anyOf": [tasks["additionalProperties"], {"type": "null"}]}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A suite of mergekit_vision"}
    return {**head, **schema, "anyOf": [{"required": ["extends"]}, {"required": ["backbone", "tasks"]}]}


def _plain(schema: Any) -> Any:
    """A schema without titles, which repeat the keys, and without defaults, which stand for absent keys."""
    if isinstance(schema, list):
        return [_plain(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _plain(part) for key, part in schema.items() if key not in ("title", "default")}


def _completed(suite: _Suite, path: Path) -> dict[str, Any]:
    root, backbone, pretrained = path.parent, suite.backbone, suite.pretrained
    if backbone.startswith(LOCAL):
        backbone = f"{LOCAL}{root / expanded(backbone[len(LOCAL) :])}"
    if pretrained.endswith(tuple(SUFFIXES)):
        pretrained = str(root / expanded(pretrained))
    tasks = {
        name: {
            "expert": ExpertSource.parse(task.expert, root) if isinstance(task.expert, str) else task.expert.source(root),
            "classes": task.classes or None,
            "templates": task.templates or None,
            "accuracy": task.accuracy,
            "at_most": task.at_most,
            "misnamed": tuple(task.misnamed),
            "traps": tuple(task.traps),
            "data": {split: resolve(source, root) for split, source in task.data.items()},
        }
        for name, task in suite.tasks.items()
    }
    return {"name": suite.name or path.stem, "backbone": backbone, "pretrained": pretrained or None, "tasks": tasks}
