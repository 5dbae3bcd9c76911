"""``merge.json``: what was merged and how, and the size and the SHA-256 of each of the model's files."""

import hashlib
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, FiniteFloat, NonNegativeInt

from mergekit_vision.checkpoints.opening import ROUTED
from mergekit_vision.encoders.config import CONFIG
from mergekit_vision.errors import InputError
from mergekit_vision.routers import ExpertDtype
from mergekit_vision.support.console import logger
from mergekit_vision.support.faults import raise_faults
from mergekit_vision.support.fingerprints import sha256 as hash_of
from mergekit_vision.support.json_files import indented, read_json
from mergekit_vision.support.schema import Schema, faults, shown
from mergekit_vision.support.switching import unsettled

RECORD, CARD = "merge.json", "README.md"
MODEL = "open_clip_model.safetensors"
EXPERTS, ROUTERS = ROUTED
STATE = "state.safetensors"
FILES = (RECORD, CARD, CONFIG, MODEL, EXPERTS, ROUTERS, STATE)
"""Files that a merged model can have, besides those of a tokenizer."""

_BLANK = "0" * 64  # stands for a file's own hash while that is computed
_REMEDY = "merge again, or set `verify` to false to use the model as it is"

_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="64 hexadecimal digits")]


def _plain(name: str) -> str:
    if not re.fullmatch(r"[^./\\\x00][^/\\\x00]*", name):
        raise ValueError(f"must name plain files, not {shown(name)}")
    return name


_FileName = Annotated[str, AfterValidator(_plain)]


class _File(Schema):
    size: NonNegativeInt
    sha256: _Digest


class _Method(Schema):
    name: str
    class_path: str
    init_args: dict[str, Any]
    recipe: str | None = None


class _Record(Schema):
    """What ``merge.json`` holds; the optional keys are missing in models of earlier versions."""

    suite: str
    backbone: str
    pretrained: str | None
    base: str = ""
    experts: dict[str, str] = Field(min_length=1)
    merger: _Method
    scale: FiniteFloat
    expert_dtype: ExpertDtype | None = None
    search: list[dict[str, FiniteFloat]]
    seconds: dict[str, FiniteFloat]
    versions: dict[str, str]
    sources: dict[str, dict[str, Any]] = Field(default_factory=dict)
    datasets: dict[str, str] = Field(default_factory=dict)
    citation: list[str] = Field(default_factory=list)
    history: list[dict[str, Any]] = Field(default_factory=list)
    version: Literal[1] = Field(1, alias="schema")
    files: dict[_FileName, _File] = Field(default_factory=dict)
    sha256: _Digest = ""


def write_record(draft: Path, record: Mapping[str, Any]) -> None:
    """Write ``merge.json`` beside the complete files of a model; it vouches for all of them and for itself."""
    files = {file.name: {"size": file.stat().st_size, "sha256": hash_of(file)} for file in sorted(draft.iterdir())}
    text = indented({"schema": 1, **record, "files": files, "sha256": _BLANK})
    before, _, after = text.rpartition(_BLANK)
    own = hashlib.sha256(text.encode()).hexdigest()
    (draft / RECORD).write_text(f"{before}{own}{after}", encoding="utf-8")


def read_record(directory: Path, verify: bool = True) -> dict[str, Any]:
    """What ``merge.json`` of a merged model holds.

    Args:
        directory: of the model.
        verify: whether all of its files must be as they were written, to the byte. The model card alone may be edited, with a
            warning. Otherwise the files must only be there.

    Raises:
        InputError: when ``directory`` holds no merged model, or one with other files than were written.
    """
    try:
        content = _content(directory)
        files = content.get("files", {})
        if verify and not files:
            problem = "merged by an earlier version, which recorded no checksums, so it cannot be checked"
            raise InputError(f"{directory}: {problem}; {_REMEDY}", of="model")
        found, remedy = _absent(directory, files), "merge again"
        if verify and not found:
            found, remedy = _altered(directory, content), _REMEDY
    except OSError as error:
        raise InputError(f"{error.filename or directory}: cannot be read ({error.strerror or error})") from error
    if found:
        found[-1] += f"; {remedy}"
    raise_faults(directory, found, of="model", brief=True)
    return content


def check_unchanged(directory: Path, record: Mapping[str, Any]) -> None:
    """Refuse a directory into which another model was written since its record was read: what was read may be of both.

    Raises:
        InputError: when ``merge.json`` holds anything else now.
    """
    if read_record(directory, verify=False) != record:
        raise InputError(f"{directory}: another model was written here while this one was read; run this again")


def files_of(directory: Path) -> Collection[str]:
    """Names of the files that the merged model in a directory consists of, but for ``merge.json``; none where there is none."""
    with suppress(InputError, OSError):
        return dict(_content(directory).get("files", {}))
    return ()


def weights_of(record: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of each file of weights that a record vouches for; none of a model that was not written yet."""
    files = record.get("files", {})
    return {name: files[name]["sha256"] for name in (MODEL, EXPERTS) if name in files}


def _content(directory: Path) -> dict[str, Any]:
    """Content of ``merge.json`` with the right keys and types."""
    path = directory / RECORD
    if not path.is_file():
        if unsettled(directory):
            raise InputError(f"{directory}: a merge was cut off while it wrote the model, or is writing it now; merge again")
        problem = f"{RECORD} is missing" if directory.exists() else "no such directory"
        raise InputError(f"{directory}: not a merged model ({problem}); make one with `Trainer.merge`", of="model")
    return dict(read_checked(path, _Record))


def read_checked(path: Path, schema: Any) -> Any:
    """Content of a JSON file of a merged model.

    Raises:
        InputError: when it cannot be read, or does not fit the schema.
    """
    try:
        content = read_json(path)
    except InputError as error:
        raise InputError(f"{error}; merge again") from error
    found = faults(schema, content, "the file")
    if found:
        found[-1] += "; merge again"
    raise_faults(path, found, brief=True)
    return content


def _absent(directory: Path, files: Collection[str]) -> list[str]:
    """Files that are missing, and experts that are not this model's: what would be evaluated is another model."""
    missing = [f"{name} is missing" for name in files if name != CARD and not (directory / name).is_file()]
    others = [name for name in (EXPERTS, ROUTERS) if files and name not in files and (directory / name).exists()]
    return [*missing, *(f"{name} is there, but does not belong to this model" for name in others)]


def _altered(directory: Path, content: Mapping[str, Any]) -> list[str]:
    """Files that are no longer as they were written. That of the model card is only mentioned: it is for people."""
    found = [] if _is_sealed(directory / RECORD, content["sha256"]) else [f"{RECORD} was changed after it was written"]
    for name, file in content["files"].items():
        fault = _difference(directory / name, **file)
        if fault and name == CARD:
            logger.warning("%s: %s", directory, fault)
        elif fault:
            found.append(fault)
    return found


def _difference(path: Path, size: int, sha256: str) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != size:
        return f"{path.name} has {path.stat().st_size} bytes, but was written with {size}"
    return None if hash_of(path) == sha256 else f"{path.name} was changed after it was written"


def _is_sealed(path: Path, recorded: str) -> bool:
    """Whether a file's own hash, which stands in it, is that of the rest."""
    before, _, after = path.read_bytes().rpartition(recorded.encode())
    return hashlib.sha256(before + _BLANK.encode() + after).hexdigest() == recorded
