"""What a comparison remembers: plain values of known layout; anything else in the cache is measured again."""

from collections.abc import Collection
from functools import partial
from typing import Annotated, Any

from pydantic import Field

from mergekit_vision.support.cache import Form, json_form
from mergekit_vision.support.schema import Schema

Entry = dict[str, Any]

_Share = Annotated[float, Field(ge=0, le=1)]
_Number = Annotated[float, Field(allow_inf_nan=True)]  # of an analysis, which shows what there is
_Seconds = dict[str, Annotated[float, Field(ge=0)]]


class _Accuracies(Schema):
    accuracy: dict[str, _Share]


class _Bytes(Schema):
    task: int
    shared: int


class _Method(_Accuracies):
    merger: dict[str, Any]
    scale: float | None
    search: list[dict[str, Any]]
    seconds: _Seconds
    dynamic: bool
    oracle: bool
    extra_parameters: int
    bytes: _Bytes
    routing: dict[str, dict[str, _Share]] | None


class _Judged(Schema):
    merger: dict[str, Any]
    scale: float
    search: list[dict[str, Any]]
    seconds: _Seconds
    agreement: dict[str, _Share]
    share: _Share
    distance: Annotated[float, Field(ge=0)]
    below_backbone: list[str]


class _Similarity(Schema):
    tasks: list[str]
    cosine: list[list[_Number]]


class _Curve(Schema):
    directions: list[int]
    esd: list[_Number]
    svd: list[_Number]
    per_task: int


class _Analysis(Schema):
    similarity: _Similarity
    energy: dict[str, _Curve]


def accuracies(tasks: Collection[str]) -> Form[Entry]:
    """Accuracies of one model on some tasks."""
    return json_form(partial(_measured, _Accuracies, tasks))


def method(tasks: Collection[str]) -> Form[Entry]:
    """What was measured of a method."""
    return json_form(partial(_measured, _Method, tasks))


def judged(experts: Collection[str]) -> Form[Entry]:
    """How a method with some parameters agrees with the experts."""
    return json_form(partial(_judged, experts))


def analysis(experts: Collection[str]) -> Form[Entry]:
    """What some experts have in common."""
    return json_form(partial(_analyzed, experts))


def _measured(schema: type[_Accuracies], tasks: Collection[str], content: Any) -> Entry:
    schema.model_validate(content)
    if list(content["accuracy"]) != list(tasks):
        raise ValueError("accuracies on other tasks")
    return dict(content)


def _judged(experts: Collection[str], content: Any) -> Entry:
    if list(_Judged.model_validate(content).agreement) != list(experts):
        raise ValueError("agreement with other experts")
    return dict(content)


def _analyzed(experts: Collection[str], content: Any) -> Entry:
    found = _Analysis.model_validate(content)
    if found.similarity.tasks != list(experts) or [len(row) for row in found.similarity.cosine] != [len(experts)] * len(experts):
        raise ValueError("an analysis of other experts")
    if any(not len(curve.directions) == len(curve.esd) == len(curve.svd) for curve in found.energy.values()):
        raise ValueError("curves of other directions")
    return dict(content)
