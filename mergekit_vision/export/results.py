"""``results.json`` of an evaluation, as far as a model card shows it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, NonNegativeInt

from mergekit_vision.encoders.routed import Route
from mergekit_vision.errors import InputError
from mergekit_vision.export.manifest import weights_of
from mergekit_vision.support.console import logger
from mergekit_vision.support.faults import raise_faults
from mergekit_vision.support.json_files import read_json, same
from mergekit_vision.support.schema import Schema, faults

RESULTS = "results.json"

_REMEDY = "name the file that test or validate wrote"


class _Open(Schema):
    """A part of the file that may have keys which no card shows."""

    model_config = ConfigDict(extra="ignore")


class _Task(_Open):
    accuracy: Annotated[float, Field(ge=0, le=1, description="a number from 0 to 1")]
    n: NonNegativeInt


class _Kind(_Open):
    kind: Literal["evaluation"]
    version: Literal[1] = Field(1, alias="schema")


class _Results(_Kind):
    suite: str
    merger: dict[str, Any]
    scale: float
    experts: dict[str, str] | None = None
    weights: dict[str, str] | None = None
    history: list[dict[str, Any]] = Field(default_factory=list)
    split: Literal["val", "test"]
    route: Route | None
    tasks: Annotated[dict[str, _Task], Field(min_length=1)]


def own_results(directory: Path) -> Path | None:
    """The evaluation in the directory of a model; ``None``, with a warning where a file of its name is none.

    Raises:
        InputError: when that file cannot be read, or is no JSON.
    """
    path = directory / RESULTS
    if not path.is_file():
        return None
    content = read_json(path)
    if isinstance(content, Mapping) and content.get("kind") == "evaluation":
        return path
    logger.warning("%s: is no evaluation, so the card has no accuracies; %s", path, _REMEDY)
    return None


def read_results(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """The accuracies that were measured on a merged model.

    Args:
        path: ``results.json``.
        record: what ``merge.json`` of the model holds.

    Raises:
        InputError: when the file cannot be read, is not of an evaluation, or of another model or route than the model's own.
            Of an evaluation by an earlier version, which named no experts, a warning says that they were not compared.
    """
    content = read_json(path)
    # of another kind of file, only that is told
    if found := faults(_Kind, content, "the file") or faults(_Results, content, "the file"):
        found[-1] += f"; {_REMEDY}"
    raise_faults(path, found, brief=True)
    differs = [key for key in ("suite", "merger", "scale") if not same(content[key], record[key])]
    absent = {"history": [], "expert_dtype": "float32"}  # of models without any, and of earlier versions
    differs += [key for key, usual in absent.items() if not same(content.get(key) or usual, record.get(key) or usual)]
    known = {"experts": record["experts"], "weights": weights_of(record)}  # no weights' hash where it was measured unwritten
    differs += [key for key, own in known.items() if content.get(key) is not None and not same(content[key], own)]
    if differs:
        problem = f"measured on another model, by its {', '.join(differs)}"
        raise InputError(f"`results` {path}: {problem}; test this one", of="command")
    if content["route"] not in (None, "router"):
        problem = f"measured with route {content['route']}, which is not how the model chooses its experts"
        raise InputError(f"`results` {path}: {problem}; test it with route router", of="command")
    if content.get("experts") is None:
        logger.warning("%s: does not say which experts were merged; if it may be of another model, test this one", path)
    return dict(content)
