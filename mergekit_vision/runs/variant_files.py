"""Files of variants: their layout, and every fault in them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from mergekit_vision.data.proxies import Proxies
from mergekit_vision.encoders.routed import Route
from mergekit_vision.errors import InputError
from mergekit_vision.merger import Merger
from mergekit_vision.merging.coefficient import Scale
from mergekit_vision.merging.recipe import Recipe
from mergekit_vision.routers import ExpertDtype
from mergekit_vision.runs.building import build_merger
from mergekit_vision.runs.variants import Variant
from mergekit_vision.support.faults import raise_faults, repeated
from mergekit_vision.support.schema import Schema, Text, faults, shown
from mergekit_vision.support.yaml_files import read_yaml


def read_variants(path: Path) -> list[Variant]:
    """The variants that a YAML file lists.

    .. code-block:: yaml

        - name: ESM, 8 proxies
          merger: {class_path: ESM, init_args: {rank: 4}}   # or its name alone
          scale: 1.0                                        # the rest is optional, and the run's where it is absent
          route: router
          expert_dtype: float32
          proxies: 8                                        # or a mapping: n, split, seed, label, source, skip
          tasks: 4                                          # the first so many, or a list of names

    Raises:
        InputError: when the file cannot be read, or with every fault in it, one a line.
    """
    content = read_yaml(path)
    raise_faults(path, _list_faults(content))
    named = {entry["name"]: entry for entry in content}
    raise_faults(path, faults(dict[str, _Variant], named))
    return [_Variant.model_validate(entry).variant() for entry in content]


def _list_faults(content: object) -> list[str]:
    """Faults of the list, by whose names all others are told."""
    if not isinstance(content, list) or not content:
        return [f"the file must be a list of variants, each with the keys name and merger, not {shown(content)}"]
    found, names = [], set[str]()
    for number, entry in enumerate(content, start=1):
        name = entry.get("name") if isinstance(entry, Mapping) else None
        if not isinstance(entry, Mapping):
            found.append(f"entry {number} must be a mapping with the keys name and merger, not {shown(entry)}")
        elif not isinstance(name, str) or not name.strip():
            found.append(f"entry {number}: `name` must be text, not {shown(name)}")
        elif name in names:
            found.append(f"entry {number}: there is another variant of the name {name}")
        else:
            names.add(name)
    return found


def _scale(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"must be a number, merger, search or agreement, not {shown(value)}")
    try:
        Recipe(value)  # type: ignore[arg-type]
    except InputError as error:
        raise ValueError(str(error).replace("`scale` is", "is")) from error
    return float(value) if isinstance(value, int) else value


def _number_of_proxies(value: object) -> object:
    return {"n": value} if isinstance(value, int) and not isinstance(value, bool) else value


class _Proxies(Schema):
    n: int = 1
    split: Text = ""
    seed: int = 0
    label: int | None = None
    source: dict[str, Any] | None = None
    skip: int = 0

    @model_validator(mode="after")
    def _sound(self) -> "_Proxies":
        Proxies(**self.model_dump(exclude_unset=True))
        return self


def _tasks(value: object) -> object:
    if isinstance(value, list) and value and all(isinstance(name, str) and name for name in value):
        if twice := repeated(value):
            raise ValueError(f"names {twice[0]} twice")
        return tuple(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise ValueError(f"must be a number of tasks, 1 or more, or a list of their names, not {shown(value)}")


class _Variant(Schema):
    name: Text
    merger: Annotated[Merger, PlainValidator(build_merger)]
    scale: Annotated[Scale | None, PlainValidator(_scale)] = None
    route: Route | None = Field(default=None, description="router, oracle or base")
    proxies: Annotated[_Proxies, BeforeValidator(_number_of_proxies)] = Field(
        default=_Proxies(), description="a number of images a task, or a mapping of n, split, seed, label, source and skip"
    )
    tasks: Annotated[int | tuple[str, ...] | None, PlainValidator(_tasks)] = None

    expert_dtype: ExpertDtype | None = Field(default=None, description="float32 or bfloat16")

    @model_validator(mode="after")
    def _routes(self) -> "_Variant":
        for name, value in (("route", self.route), ("expert_dtype", self.expert_dtype)):
            if value is not None and self.merger.kind == "static":
                raise ValueError(f"`{name}` {value}: {type(self.merger).__name__} returns a static model, which routes nothing")
        return self

    def variant(self) -> Variant:
        """What the file says, as a row."""
        proxies = self.proxies.model_dump(exclude_unset=True)
        return Variant(self.name, self.merger, self.scale, self.route, proxies, self.tasks, self.expert_dtype)
