"""Labeled image sources by a small mapping: Parquet files, the Hugging Face hub, an image folder, a torchvision data set.

======================================================  ===================================================================
mapping                                                 images
======================================================  ===================================================================
``{parquet: FILE_OR_GLOB}``                             local Parquet in the Hugging Face image schema
``{hub: ORG/NAME, split: S, name: N, revision: R}``     a data set on the hub or a local copy of one (extra ``hub``)
``{folder: DIRECTORY}``                                 one sub-directory a class, in alphabetical order
``{torchvision: CLASS_PATH, args: {…}}``                any map-style data set class yielding (PIL image, class index)
======================================================  ===================================================================

``parquet`` and ``hub`` take the column names ``image:`` and ``label:`` where they differ from those. Each kind may be divided:
``part: val`` is a tenth of its images, at most 5000 unless ``cap: false``, and ``part: train`` the rest; see
:func:`mergekit_vision.sources.part.part_indices`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainValidator, WithJsonSchema, model_validator

from mergekit_vision.support.faults import closest
from mergekit_vision.support.paths import expanded, is_directory
from mergekit_vision.support.schema import FilePath, Schema, Text, faults, shown

SourceConfig = Mapping[str, Any]
"""One source as it stands in a suite file; the module's text lists the kinds."""


class _Dividable(Schema):
    part: Literal["val", "train"] | None = Field(default=None, description="val or train")
    cap: bool = True

    @model_validator(mode="after")
    def _divided(self) -> "_Dividable":
        if not self.cap and self.part is None:
            raise ValueError("`cap` goes with `part`")
        return self


class _Columns(_Dividable):
    image: Text = "image"
    label: Text = "label"


class _Parquet(_Columns):
    parquet: FilePath


class _Hub(_Columns):
    hub: FilePath
    split: Text
    name: Text = ""
    revision: Text = ""


class _Folder(_Dividable):
    folder: FilePath


def _root(args: dict[str, Any]) -> dict[str, Any]:
    if isinstance(args.get("root"), str):
        expanded(args["root"])
    return args


class _Torchvision(_Dividable):
    torchvision: Text
    args: Annotated[dict[str, Any], AfterValidator(_root)] = Field(default={}, description="a mapping of arguments")


_KINDS: dict[str, type[Schema]] = {"parquet": _Parquet, "hub": _Hub, "folder": _Folder, "torchvision": _Torchvision}


def _checked(config: object) -> SourceConfig:
    """The mapping as it is, once the schema of its kind has passed it."""
    if not isinstance(config, Mapping):
        raise ValueError(f"must be a mapping such as `parquet: FILE`, not {shown(config)}")
    kinds = [kind for kind in _KINDS if kind in config]
    if not kinds:
        hints = [f"unknown key `{key}`{closest(str(key), _KINDS)}" for key in config] or ["is empty"]
        raise ValueError(f"{'; '.join(hints)}; a source is one of {', '.join(_KINDS)}")
    if len(kinds) > 1:
        raise ValueError(f"names more than one source: {', '.join(kinds)}; keep one")
    _KINDS[kinds[0]].model_validate(dict(config))
    return config


_KINDS_AS_JSON = {"anyOf": [kind.model_json_schema() for kind in _KINDS.values()]}

Source = Annotated[SourceConfig, PlainValidator(_checked), WithJsonSchema(_KINDS_AS_JSON)]
"""A source in a schema."""


def kind_of(config: SourceConfig) -> str:
    """The kind of a well-formed source: ``parquet``, ``hub``, ``folder`` or ``torchvision``."""
    return next(kind for kind in _KINDS if kind in config)


def is_fetched(config: SourceConfig) -> bool:
    """Whether a well-formed source may be downloaded when it is opened."""
    return kind_of(config) in {"hub", "torchvision"}


def config_faults(config: object) -> list[str]:
    """What is wrong with the layout of a source's mapping, one text a fault.

    >>> from mergekit_vision.sources.config import config_faults
    >>> config_faults({"parqet": "a.parquet"})
    ['unknown key `parqet` (did you mean `parquet`?); a source is one of parquet, hub, folder, torchvision']
    """
    return faults(Source, config)


def resolve(config: SourceConfig, root: Path) -> dict[str, Any]:
    """The same source with relative paths made absolute from ``root`` (a hub id only where it is a directory there)."""
    resolved = dict(config)
    for key in ("parquet", "folder"):
        if key in resolved:
            resolved[key] = str(root / expanded(resolved[key]))
    if "hub" in resolved and is_directory(place := root / expanded(resolved["hub"])):
        resolved["hub"] = str(place)
    if isinstance(resolved.get("args"), Mapping) and isinstance(resolved["args"].get("root"), str):
        resolved["args"] = {**resolved["args"], "root": str(root / expanded(resolved["args"]["root"]))}
    return resolved
