"""What was kept of a merge beside the model, so that experts can join and leave it: ``state.safetensors``."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from mergekit_vision.checkpoints import save_safetensors
from mergekit_vision.errors import InputError
from mergekit_vision.export.manifest import STATE
from mergekit_vision.merger import Weights
from mergekit_vision.support.json_files import same, to_json
from mergekit_vision.support.schema import Schema, faults
from mergekit_vision.support.tensors import FINITE, unusable

_ABOUT = "mergekit_vision"  # key in the file's header
_REMEDY = "merge again with `keep_state`"


@dataclass(frozen=True)
class State:
    """What was kept.

    Attributes:
        tensors: by name, as the method gave them.
        seen: task -> which proxy images the method saw of it: how they were drawn (``proxies``), and a hash of them (``images``),
            which states of earlier versions lack; empty where it sees none.
    """

    tensors: Weights
    seen: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class _Seen(Schema):
    proxies: dict[str, Any]
    images: str = ""


class _About(Schema):
    """What the file's header says; earlier versions wrote how the proxy images of all tasks were drawn, as ``proxies``."""

    version: Literal[1] = Field(alias="schema")
    merger: dict[str, Any]
    experts: list[str]
    seen: dict[str, _Seen] = Field(default_factory=dict)
    proxies: dict[str, Any] = Field(default_factory=dict)


def write_state(draft: Path, state: State, record: Mapping[str, Any]) -> None:
    """Write what was kept beside the files of a model, with the method and the experts that it is of."""
    about = {"schema": 1, **_of(record), "seen": dict(state.seen)}
    save_safetensors(draft / STATE, state.tensors, {_ABOUT: to_json(about)})


def read_state(directory: Path, record: Mapping[str, Any]) -> State | None:
    """What was kept of a model; ``None`` where nothing was.

    Args:
        directory: of the model.
        record: what its ``merge.json`` holds.

    Raises:
        InputError: when the file cannot be read, is of another version, of another merge, or holds NaN or infinity.
    """
    path = directory / STATE
    if STATE not in record.get("files", {}):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: is damaged ({error}); {_REMEDY}") from error
    about = _read_about(path, header.get(_ABOUT, "null"))
    if not same(_of(record), {"merger": about["merger"], "experts": about["experts"]}):
        raise InputError(f"{path}: was kept of another merge, by its method, parameters or experts; {_REMEDY}")
    if wrong := unusable(tensors, FINITE):
        raise InputError(f"{path}: {wrong[0]}; {_REMEDY}")
    drawn = about["experts"] if about.get("proxies") else ()
    return State(tensors, about.get("seen") or {task: {"proxies": about["proxies"]} for task in drawn})


def _of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Which merge a state is of."""
    return {"merger": record["merger"], "experts": list(record["experts"])}


def _read_about(path: Path, text: str) -> Mapping[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: its header is not valid JSON ({error}); {_REMEDY}") from error
    if found := faults(_About, content, "the header"):
        raise InputError(f"{path}: {'; '.join(found)}; {_REMEDY}")
    about: Mapping[str, Any] = content
    return about
