"""Merging methods from plain data, as files name them."""

import inspect
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import Field, TypeAdapter
from pydantic.errors import PydanticUserError

from mergekit_vision import registry
from mergekit_vision.errors import InputError
from mergekit_vision.merger import Merger
from mergekit_vision.support.faults import closest
from mergekit_vision.support.imports import registered
from mergekit_vision.support.schema import Schema, Text, faults, shown


class _Method(Schema):
    class_path: Text
    init_args: dict[Text, Any] = Field(default={}, description="a mapping of parameters to values")


def build_merger(content: object) -> Merger:
    """The method that plain data stand for.

    Args:
        content: a name or class path, or a mapping of it as ``class_path`` and of parameters as ``init_args``. A parameter that
            is itself a method is given in the same way.

    Raises:
        ValueError: with what is wrong, and at which parameter.

    >>> from mergekit_vision.runs.building import build_merger
    >>> build_merger({"class_path": "ESMPP", "init_args": {"rank": 8, "base": "TSVM"}}).base
    TSVM(rank=None, other='tsvm', scale_average=True, floor=0.25)
    """
    if not isinstance(content, str | Mapping):
        raise ValueError(f"must be a method's name, or a mapping of class_path and init_args, not {shown(content)}")
    method = {"class_path": content} if isinstance(content, str) else content
    if wrong := faults(_Method, method):
        raise ValueError("; ".join(wrong))
    named = _Method.model_validate(method)
    merger = registry.get(named.class_path)
    _check_names(merger, named.init_args)
    hints = _hints(merger)
    given = {name: _value(f"init_args.{name}", hints.get(name, Any), value) for name, value in named.init_args.items()}
    try:
        return merger(**given)
    except TypeError as error:  # a plugin's own constructor, of values that it cannot use
        raise ValueError(f"{merger.__name__}: {error}") from error


def recorded_merger(record: Mapping[str, Any], allow_code: bool = False) -> Merger:
    """The method that ``merge.json`` names.

    Args:
        record: as :func:`~mergekit_vision.merging.record.merger_record` wrote it.
        allow_code: whether a class that no installed package registers may be imported.

    Raises:
        InputError: when it is not installed, or no longer takes its parameters.
    """
    try:
        return build_merger(_recorded(record, allow_code))
    except ValueError as error:
        raise InputError(f"the method of the merged model cannot be made: {error}") from error


def _recorded(record: Mapping[str, Any], allow_code: bool) -> dict[str, Any]:
    path, given = str(record["class_path"]), dict(record["init_args"])
    if not allow_code and registered(registry.GROUP, path) is None:
        raise InputError(
            f"{path:.80} is registered by no installed package, so it is not imported; install the package that defines it, "
            "or, if you trust the model and the class, allow_code (command line: --allow-code)"
        )
    nested = {name for name, value in given.items() if isinstance(value, Mapping) and "class_path" in value}
    values = {name: _recorded(value, allow_code) if name in nested else value for name, value in given.items()}
    return {"class_path": path, "init_args": values}


def _check_names(merger: type[Merger], given: Mapping[str, Any]) -> None:
    """Refuse parameters that a method does not have, and missing ones."""
    signature = inspect.signature(merger)
    known = list(signature.parameters)
    any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    if not any_name and (unknown := [name for name in given if name not in known]):
        takes = f"takes {', '.join(known)}" if known else "takes no parameters"
        raise ValueError(f"unknown key `init_args.{unknown[0]}`{closest(unknown[0], known)}; {merger.__name__} {takes}")
    try:
        signature.bind(**given)
    except TypeError as error:
        raise ValueError(f"init_args of {merger.__name__}: {error}") from error


def _hints(merger: type[Merger]) -> dict[str, Any]:
    """Types of the parameters; none where they cannot be told."""
    try:
        return get_type_hints(merger.__init__)
    except Exception:  # the annotations of a third party may name anything
        return {}


def _value(place: str, hint: Any, value: Any) -> Any:
    """A parameter's value, of the type that it is declared with; lists stand for tuples."""
    if any(isinstance(part, type) and issubclass(part, Merger) for part in (hint, *get_args(hint))):
        return None if value is None else _nested(place, value)
    if get_origin(hint) is tuple and isinstance(value, list):
        value = tuple(value)
    try:
        if wrong := faults(hint, value, place):
            raise ValueError("; ".join(wrong))
        return TypeAdapter(hint).validate_python(value)
    except PydanticUserError:  # a type that values cannot be checked against
        return value


def _nested(place: str, value: object) -> Merger:
    try:
        return build_merger(value)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
